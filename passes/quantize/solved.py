"""Weights that were found by computation, on disk: written segment by segment, each whole or not at all.

An interrupted run finds here what it had done. Knows files and tensors; knows no method.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...ir.coded import Codes
from ...ir.printer import print_program
from ...ir.program import Program
from ...ir.quantized import QTensor
from ...ir.weights import Constant, Expr, Source, leaves
from ...spec.errors import TargetError
from ...spec.history import LayerError

# Raised whenever the same inputs would give other codes: results of other versions are not taken up.
_VERSION = 3


class Result(NamedTuple):
    """One weight found: its parts, what it loses, and what is to be said about it."""

    tensor: QTensor
    error: LayerError
    note: str


class SolvedFolder:
    """Results by segment in one folder. `load` gives None for what is not there yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, segment: int) -> dict[str, Result] | None:
        """The results of a segment by weight name, mapped; None when there are none."""
        path = self._path(segment)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                notes = msgspec.json.decode(file.metadata()["results"])
                return {name: _result(file, name, *notes[name]) for name in notes}
        except (SafetensorError, OSError, KeyError, TypeError, msgspec.DecodeError):
            path.unlink()  # cut short by a crash of the machine: it is computed again
            return None

    def save(self, segment: int, results: Mapping[str, Result]) -> None:
        """Keep the results of a segment. Raises TargetError when the disk is full."""
        tensors: dict[str, Tensor] = {}
        for name, result in results.items():
            for part in ("codes", "scales", "zeros"):
                value = getattr(result.tensor, part)
                if value is not None:
                    tensors[f"{name}.{part}"] = value.contiguous()
        notes = {name: (r.error.error, r.error.nearest_error, r.note) for name, r in results.items()}
        path = self._path(segment)
        partial = path.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"results": msgspec.json.encode(notes).decode()})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TargetError(
                "target.disk_full",
                "Quantised weights could not be written.",
                f"Writing to {str(self._folder)!r} failed: {error}.",
                "Free some space and run the same command again: it takes up where it stopped.",
            ) from error

    def parts(self, segment: int, name: str, expr: Expr, results: Mapping[str, Result]) -> dict[str, Expr]:
        """Expressions for the stored parts of weight `name`, by the names they get."""
        count = 1
        for size in expr.shape:
            count *= size
        found: dict[str, Expr] = {}
        for part in ("codes", "scales", "zeros"):
            value = getattr(results[name].tensor, part)
            if value is not None:
                key = f"{name}.{part}"
                source = Source(str(self._path(segment)), key, tuple(value.shape), value.dtype)
                found[key] = Codes(source, count if part == "codes" else 0)
        return found

    def _path(self, segment: int) -> Path:
        return self._folder / f"segment-{segment:04d}.safetensors"


def _result(file: Any, name: str, error: float, nearest_error: float, note: str) -> Result:
    keys = set(file.keys())
    parts = [
        file.get_tensor(f"{name}.{part}") if f"{name}.{part}" in keys else None
        for part in ("codes", "scales", "zeros")
    ]
    tensor = QTensor(*parts)  # pyright: ignore[reportArgumentType]
    return Result(tensor, LayerError(subject=name, error=error, nearest_error=nearest_error), note)


def fingerprint(program: Program, *inputs: Any) -> str:
    """Names what results depend on: the program, its weights (files by size and time), and `inputs`, whose
    `repr` must tell them apart."""
    digest = hashlib.sha256(f"{_VERSION} {torch.__version__} {inputs!r}\n".encode())
    digest.update(print_program(program).encode())
    for name in program.used_weights():
        for leaf in leaves(program.weights[name]):
            digest.update(f"{name} {_identity(leaf)}\n".encode())
    return digest.hexdigest()[:32]


def _identity(leaf: Any) -> str:
    if isinstance(leaf, Source):
        status = os.stat(leaf.path)
        return f"{leaf.path} {leaf.key} {status.st_size} {status.st_mtime_ns}"
    if isinstance(leaf, Constant):
        values = leaf.value.contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return repr(leaf)
