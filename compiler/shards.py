"""Safetensors shards by their headers: names, shapes, dtypes and sizes. Reads no tensor data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..spec.errors import ModelError
from .json_files import read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint as its header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name: sharded with an index, or one file.

    Raises ModelError for weights that are absent, pickled, incomplete, truncated or damaged.
    """
    if (folder / INDEX_NAME).exists():
        return _sharded(folder)
    if (folder / SINGLE_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    raise _no_weights(folder)


def holds_weights(folder: Path) -> bool:
    """Whether there is any file of weights in `folder`, one that can be read or not."""
    patterns = (INDEX_NAME, "*.safetensors", *_PICKLES)
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelError(
            "model.pickle",
            f"The weights of {folder.name} are pickled ({pickles[0]}).",
            "Loading a pickle runs whatever code is in it, so llmc does not.",
            "Convert the model to safetensors: load it with transformers and call save_pretrained.",
        )
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    if stray:
        return ModelError(
            "model.no_index",
            f"{folder.name} has {len(stray)} safetensors file(s) but no {INDEX_NAME}.",
            f"Without an index the weights are expected in {SINGLE_NAME}; found {stray[0]}.",
            f"Copy {INDEX_NAME} from where the model came from.",
        )
    return ModelError(
        "model.no_weights",
        f"{folder.name} holds no weights.",
        f"There is neither {SINGLE_NAME} nor {INDEX_NAME} in the folder.",
        "Finish the download, or name the folder that holds the safetensors files.",
    )


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = read_object(folder / INDEX_NAME)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(
            "model.bad_index",
            f"{INDEX_NAME} lists no weights.",
            "It has no `weight_map` from tensor names to shard files.",
            "Copy the index from where the model came from.",
        )
    weight_map = cast("dict[str, str]", listed)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "model.missing_shard",
            f"{len(missing)} of {len(shards)} weight shards are missing: {_some(missing)}.",
            f"{INDEX_NAME} names them and {folder.name} does not hold them.",
            "Finish the download of the model.",
        )
    headers = {name: read_header(folder / name) for name in shards}
    absent = [key for key, shard in weight_map.items() if key not in headers[shard]]
    if absent:
        raise ModelError(
            "model.index_mismatch",
            f"{len(absent)} tensors are not in the shard the index names: {_some(absent)}.",
            f"{INDEX_NAME} and the shards do not belong together.",
            "Download the model again.",
        )
    return {key: headers[shard][key] for key, shard in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, its size checked against what the header promises.

    Raises ModelError for a file that is too short, too long or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ModelError(
                "model.lfs_pointer",
                f"{path.name} is a Git LFS pointer, not weights.",
                "The repository was cloned without its large files.",
                "Run `git lfs pull` in the model folder.",
            )
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or header_bytes + 8 > size:
            raise _truncated(path, header_bytes + 8, size)
        if header_bytes > _MAX_HEADER_BYTES:
            raise _damaged(path, f"it claims a header of {header_bytes} bytes")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    entries = cast("dict[str, Any]", header)
    entries.pop("__metadata__", None)
    end = _end_of_data(path, entries)
    if 8 + header_bytes + end != size:
        if 8 + header_bytes + end > size:
            raise _truncated(path, 8 + header_bytes + end, size)
        raise _damaged(path, f"it has {size - 8 - header_bytes - end} bytes behind the last tensor")
    return {
        key: StoredTensor(path, key, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        for key, entry in entries.items()
    }


def _end_of_data(path: Path, entries: Mapping[str, Any]) -> int:
    """Where the last tensor ends, relative to the data; every entry is checked on the way."""
    end = 0
    for key, entry in entries.items():
        try:
            dtype, shape = entry["dtype"], [int(size) for size in entry["shape"]]
            first, last = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the entry of tensor {key!r} is malformed") from error
        if dtype not in _DTYPES:
            raise ModelError(
                "model.tensor_dtype",
                f"Tensor {key!r} in {path.name} is stored as {dtype}.",
                f"llmc reads {', '.join(_DTYPES)}.",
                "Convert the checkpoint to bfloat16.",
            )
        if last - first != math.prod(shape) * _DTYPES[dtype].itemsize or first < 0:
            raise _damaged(path, f"tensor {key!r} of shape {shape} does not fill its bytes")
        end = max(end, last)
    return end


def _truncated(path: Path, promised: int, size: int) -> ModelError:
    return ModelError(
        "model.truncated_shard",
        f"{path.name} is truncated.",
        f"Its header promises {promised} bytes and the file has {size}.",
        "Download the file again.",
    )


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(
        "model.damaged_shard",
        f"{path.name} is not a readable safetensors file.",
        f"It cannot be used because {reason}.",
        "Download the file again.",
    )


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
