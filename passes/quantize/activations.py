"""Activations of many batches: in memory up to a bound, beyond it in files that go when they are taken.

Knows tensors and files; knows no graph.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...spec.errors import TargetError


class ActivationStore:
    """Tensors by batch and name. What is put beyond `memory_bytes` goes to files in a folder of its own in
    `parent`, made when it is needed; a value is gone once it was taken. Use `close` when done, however it
    ends."""

    def __init__(self, parent: Path, memory_bytes: int) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._memory_bytes = memory_bytes
        self._used_bytes = 0
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._spilled: dict[tuple[int, str], tuple[Path, torch.dtype, torch.Size]] = {}
        self._count = 0

    def put(self, batch: int, values: Mapping[str, Tensor]) -> None:
        """Keep copies of `values`. Raises TargetError when the disk is full."""
        for name, value in values.items():
            if self._used_bytes + value.nbytes <= self._memory_bytes:
                self._kept[batch, name] = value.clone(memory_format=torch.contiguous_format)
                self._used_bytes += value.nbytes
            else:
                self._spilled[batch, name] = (self._write(value), value.dtype, value.shape)

    def take(self, batch: int, name: str) -> Tensor:
        """The value put under `batch` and `name`, which is then forgotten."""
        kept = self._kept.pop((batch, name), None)
        if kept is not None:
            self._used_bytes -= kept.nbytes
            return kept
        value = self.look(batch, name)
        self._spilled.pop((batch, name))[0].unlink()
        return value

    def look(self, batch: int, name: str) -> Tensor:
        """The value put under `batch` and `name`."""
        if (batch, name) in self._kept:
            return self._kept[batch, name]
        path, dtype, shape = self._spilled[batch, name]
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Forget everything and remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._spilled.clear()
        self._kept.clear()

    def _write(self, value: Tensor) -> Path:
        try:
            if self._folder is None:
                self._parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self._parent))
            path = self._folder / f"{self._count}.bin"
            self._count += 1
            write_bytes(value, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TargetError(
                "target.disk_full",
                "The disk became full while calibration spilled activations.",
                f"No space is left at {str(self._parent)!r} for {value.nbytes} more bytes.",
                "Free some space or calibrate on fewer tokens, then run the same command again: it takes up "
                "where it stopped.",
            ) from error
        return path


def write_bytes(value: Tensor, path: Path) -> None:
    """The bytes of a tensor, in row-major order, as a file."""
    path.write_bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
