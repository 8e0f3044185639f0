"""Tensors on disk, in the safetensors format: written one at a time, read as memory-mapped views.

Dtypes go by their torch names; numpy has no bfloat16 and no float8, whose bits appear as uint16 and uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..spec.errors import ArtifactError, InternalError

ALIGNMENT = 64
_PADDING = "__padding__"
_MAX_HEADER_BYTES = 100_000_000

# Name here -> (name in the file, numpy dtype of its bits).
_DTYPES: dict[str, tuple[str, str]] = {
    "bool": ("BOOL", "?"),
    "uint8": ("U8", "u1"),
    "int8": ("I8", "i1"),
    "int16": ("I16", "<i2"),
    "int32": ("I32", "<i4"),
    "int64": ("I64", "<i8"),
    "uint16": ("U16", "<u2"),
    "uint32": ("U32", "<u4"),
    "uint64": ("U64", "<u8"),
    "float8_e4m3fn": ("F8_E4M3", "u1"),
    "float8_e5m2": ("F8_E5M2", "u1"),
    "float8_e8m0fnu": ("F8_E8M0", "u1"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float32": ("F32", "<f4"),
    "float64": ("F64", "<f8"),
    "complex64": ("C64", "<c8"),
}
_NAMES = {stored: name for name, (stored, _) in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written: `dtype` is a torch name such as `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(_stored(self.dtype)[1]).itemsize


@dataclass(frozen=True, slots=True)
class TensorView:
    """A stored tensor: `data` is a read-only view of the mapped file, `dtype` what its bits mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]


class Sink(Protocol):
    """Where bytes go, in order."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def write_tensors(sink: Sink, specs: Sequence[TensorSpec], fetch: Callable[[str], NDArray[Any]]) -> None:
    """Writes one safetensors file: header first, then the values of each spec in the given order.

    `fetch(name)` gives C-contiguous values, asked for once each and not kept. Every tensor starts at a
    multiple of `ALIGNMENT` bytes of the file; the format allows no holes, so gaps are tensors called
    `__padding__.N`.
    """
    padded = list(_with_padding(specs))
    sink.write(_header(padded))
    for spec in padded:
        if spec.name.startswith(_PADDING):
            sink.write(bytes(spec.size_bytes))
            continue
        values = fetch(spec.name)
        if values.nbytes != spec.size_bytes or not values.flags.c_contiguous:
            raise InternalError(
                "artifact.tensor_size",
                f"Tensor {spec.name!r} has {values.nbytes} bytes.",
                f"Its shape {list(spec.shape)} and dtype {spec.dtype} need {spec.size_bytes}, contiguous.",
                "Report this with the command that led to it.",
            )
        if values.nbytes:
            sink.write(values.reshape(-1).view(np.uint8).data)


def _with_padding(specs: Sequence[TensorSpec]) -> Iterator[TensorSpec]:
    end = 0
    for index, spec in enumerate(specs):
        gap = -end % ALIGNMENT
        if gap:
            yield TensorSpec(f"{_PADDING}.{index}", "uint8", (gap,))
        yield spec
        end += gap + spec.size_bytes


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Length and JSON, padded with spaces so that the values start aligned."""
    entries: dict[str, _Entry] = {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.size_bytes
        entries[spec.name] = _Entry(_stored(spec.dtype)[0], spec.shape, (start, end))
    text = msgspec.json.encode(entries)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _stored(dtype: str) -> tuple[str, str]:
    if dtype not in _DTYPES:
        raise InternalError(
            "artifact.dtype",
            f"A tensor of dtype {dtype!r} cannot be stored.",
            f"Artifacts hold {', '.join(_DTYPES)}.",
            "Report this with the command that led to it.",
        )
    return _DTYPES[dtype]


def read_tensors(path: Path) -> dict[str, TensorView]:
    """The tensors of the safetensors file at `path`, in the file's order, mapped and not read.

    Raises ArtifactError when the file's header does not describe its bytes.
    """
    entries, start = _read_header(path)
    size = path.stat().st_size
    mapped = np.memmap(path, dtype=np.uint8, mode="r") if size > start else np.empty(size, np.uint8)
    return {name: _view(path, name, entry, mapped[start:]) for name, entry in entries.items()}


def locate_tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Where the values of each tensor lie in the safetensors file at `path`: (offset, length) in bytes."""
    entries, start = _read_header(path)
    return {
        name: (start + entry.data_offsets[0], entry.data_offsets[1] - entry.data_offsets[0])
        for name, entry in entries.items()
    }


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """The entries but for padding, and where values begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise _unreadable(path, f"its header cannot have {header_bytes} bytes")
        text = file.read(header_bytes)
    entries = _decode_header(path, text)
    kept = {name: entry for name, entry in entries.items() if not name.startswith(_PADDING)}
    return kept, 8 + header_bytes


def _decode_header(path: Path, text: bytes) -> Mapping[str, _Entry]:
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _unreadable(path, f"its header is no safetensors header ({error})") from error


def _view(path: Path, name: str, entry: _Entry, data: NDArray[np.uint8]) -> TensorView:
    dtype = _NAMES.get(entry.dtype)
    if dtype is None:
        raise _unreadable(path, f"tensor {name!r} has the unknown dtype {entry.dtype!r}")
    start, stop = entry.data_offsets
    spec = TensorSpec(name, dtype, entry.shape)
    is_inside = 0 <= start <= stop <= len(data) and all(size >= 0 for size in entry.shape)
    if not is_inside or stop - start != spec.size_bytes:
        raise _unreadable(path, f"tensor {name!r} does not lie within the file")
    values = data[start:stop].view(_DTYPES[dtype][1]).reshape(entry.shape)
    return TensorView(name, dtype, entry.shape, cast("NDArray[Any]", values))


def _unreadable(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "artifact.tensors",
        f"The tensors of {path.name} cannot be read.",
        f"The file is damaged: {why}.",
        "Copy the artifact again, or compile the model again.",
    )
