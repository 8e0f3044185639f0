"""Safetensors shards of bounded size, with an index where there are several; holds one shard at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...spec.errors import InternalError
from ..shards import INDEX_NAME, SINGLE_NAME

_SHARD_BYTES = 2 << 30


class ShardWriter:
    """Writes the tensors it is given to `folder`; `close` names the files and writes the index."""

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`; a name comes once."""
        if name in self._seen:
            raise InternalError(
                "export.twice",
                f"The tensor {name!r} was written twice.",
                "Two weights of the program claim to be it.",
                "Report the model this happened with.",
            )
        if self._held and self._held_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._seen.add(name)
        self._held[name] = tensor.contiguous()
        self._held_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is held, and give the files their names."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        listed = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX_NAME).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        save_file(self._held, path, {"format": "pt"})
        path.chmod(0o644)  # the library's own mode shuts other users out
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"shard-{index}.partial"
