"""What a compiled kernel says of itself: the parameters in its ELF file. Knows no compiler and no driver."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from ...spec.errors import InternalError

_PARAMETER_INFO = 0x17
_SIZED_VALUE = 4
# Bytes of a parameter by triton's name of its type; pointers take 8.
_SIZES = {"i32": 4, "fp32": 4}


def parameter_layout(cubin: bytes, name: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of each parameter of kernel `name`, in order.

    They stand in section `.nv.info.<name>`, as records of attribute EIATTR_KPARAM_INFO. Raises InternalError
    for bytes that are no such file.
    """
    found: dict[int, tuple[int, int]] = {}
    for kind, payload in _attributes(_section(cubin, f".nv.info.{name}")):
        if kind == _PARAMETER_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", payload)
            found[ordinal] = (offset, flags >> 18)
    return [found[ordinal] for ordinal in sorted(found)]


def check_parameters(cubin: bytes, name: str, types: Sequence[str]) -> None:
    """Hold the file to the types that a launch passes, and to the two scratch pointers that triton adds.

    Raises InternalError naming the first parameter that lies elsewhere.
    """
    expected: list[tuple[int, int]] = []
    offset = 0
    for kind in (*types, "*i8", "*i8"):
        size = _SIZES.get(kind, 8)
        offset = -(-offset // size) * size
        expected.append((offset, size))
        offset += size
    found = parameter_layout(cubin, name)
    if found != expected:
        first = next(
            (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None
        )
        where = f"parameter {first}" if first is not None else f"{len(found)} parameters, not {len(expected)}"
        raise InternalError(
            "cuda.parameters",
            f"Kernel {name!r} takes other parameters than it is launched with.",
            f"They differ at {where}: the file says {found}, the launch {expected}.",
            "Report this with the versions of triton and llmc.",
        )


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(section):
        form, kind, value = struct.unpack_from("<BBH", section, position)
        position += 4
        if form == _SIZED_VALUE:
            yield kind, section[position : position + value]
            position += value


def _section(cubin: bytes, name: str) -> bytes:
    if cubin[:4] != b"\x7fELF" or len(cubin) < 64:
        raise _not_a_cubin(name)
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry_size) for index in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, size in headers:
        start = names + name_offset
        if cubin[start : cubin.index(b"\0", start)] == name.encode():
            return cubin[offset : offset + size]
    raise _not_a_cubin(name)


def _not_a_cubin(name: str) -> InternalError:
    return InternalError(
        "cuda.cubin",
        "A compiled kernel cannot be read.",
        f"It is no ELF file with a section {name!r}.",
        "Compile the model again; if it happens again, report the version of triton.",
    )
