"""The weight layout of kernels that look values up, for schemes without an integer layout, in numpy.

kernels/cpu/table_linear.hpp draws it. Knows bytes only: no graph, no torch, no file.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..spec.quant import QuantScheme, codebook
from .packing import TILE_ROWS, Bytes

_LOW, _FOUR = np.uint8(15), np.uint8(4)
_T = TypeVar("_T", np.float32, np.uint8)
_KINDS = {"int": "kInt", "fp8": "kFp8", "nf4": "kNf4", "fp4": "kFp4"}


class TableCodes(NamedTuple):
    """A matrix `[N, K]` in the portable packing of `ir.quantized`: codes as bytes, scales widened to float32
    `[scale rows, groups]`, uint8 zeros like them or None."""

    codes: Bytes
    scales: NDArray[np.float32]
    zeros: Bytes | None


def table_type(scheme: QuantScheme) -> str:
    """The C++ type of codes of `scheme`."""
    offset = 1 << (scheme.bits - 1) if scheme.code_type == "int" and scheme.symmetric else 0
    flags = ", ".join("true" if flag else "false" for flag in (_is_whole(scheme), not scheme.symmetric))
    return f"llmc::TableCodes<llmc::CodeKind::{_KINDS[scheme.code_type]}, {flags}, {offset}>"


def table_group(scheme: QuantScheme, in_features: int) -> int:
    """Codes that share a scale in the stream."""
    return scheme.group_size or in_features


def table_bytes(scheme: QuantScheme, out_features: int, in_features: int) -> int:
    """Size of a packed matrix, without the slack that must be readable behind it."""
    return -(-out_features // TILE_ROWS) * sum(
        _record_bytes(scheme, size) for size in _sizes(scheme, in_features)
    )


def pack_table(matrix: TableCodes, scheme: QuantScheme, out_features: int, in_features: int) -> Bytes:
    """`matrix` in tiles of 32 rows: uint8 `[bytes]`."""
    num_tiles = -(-out_features // TILE_ROWS)
    codes = np.zeros((num_tiles * TILE_ROWS, in_features), dtype=np.uint8)
    codes[:out_features] = _bytes_of(matrix.codes, scheme)[:, :in_features]
    by_tile = codes.reshape(num_tiles, TILE_ROWS, in_features).transpose(0, 2, 1)
    scales = _by_tile(matrix.scales, scheme, out_features)
    zeros = None if matrix.zeros is None else _by_tile(matrix.zeros, scheme, out_features)
    parts: list[Bytes] = []
    start = 0
    for group, size in enumerate(_sizes(scheme, in_features)):
        parts.append(np.ascontiguousarray(scales[:, :, group]).view(np.uint8))
        if zeros is not None:
            parts.append(zeros[:, :, group])
        some = by_tile[:, start : start + size]
        if not _is_whole(scheme):
            some = np.concatenate(
                [some, np.full((num_tiles, size % 2, TILE_ROWS), _zero(scheme), np.uint8)], 1
            )
            some = some[:, 0::2] | (some[:, 1::2] << _FOUR)
        parts.append(some.reshape(num_tiles, -1))
        start += size
    return np.concatenate(parts, axis=1).reshape(-1)


def unpack_table(packed: Bytes, scheme: QuantScheme, out_features: int, in_features: int) -> TableCodes:
    """Inverse of `pack_table`, where padding is codes of value zero."""
    num_tiles = -(-out_features // TILE_ROWS)
    tiles = packed.reshape(num_tiles, -1)
    codes = np.full((num_tiles * TILE_ROWS, scheme.padded_in_features(in_features)), _zero(scheme), np.uint8)
    scales: list[NDArray[np.float32]] = []
    zeros: list[Bytes] = []
    at = start = 0
    for size in _sizes(scheme, in_features):
        scales.append(tiles[:, at : at + 4 * TILE_ROWS].copy().view(np.float32).reshape(-1))
        at += 4 * TILE_ROWS
        if not scheme.symmetric:
            zeros.append(tiles[:, at : at + TILE_ROWS].reshape(-1))
            at += TILE_ROWS
        count = size if _is_whole(scheme) else -(-size // 2)
        some = tiles[:, at : at + count * TILE_ROWS].reshape(num_tiles, count, TILE_ROWS)
        at += count * TILE_ROWS
        if not _is_whole(scheme):
            some = np.stack((some & _LOW, some >> _FOUR), axis=2).reshape(num_tiles, 2 * count, TILE_ROWS)[
                :, :size
            ]
        codes[:, start : start + size] = some.transpose(0, 2, 1).reshape(-1, size)
        start += size
    step = scheme.block_rows or 1
    return TableCodes(
        _portable(codes[:out_features], scheme),
        np.stack(scales, axis=1)[:out_features:step].copy(),
        None if scheme.symmetric else np.stack(zeros, axis=1)[:out_features:step].copy(),
    )


def _is_whole(scheme: QuantScheme) -> bool:
    """Whether the stream has a byte a code: a group of an odd number of nibbles would end within one."""
    return scheme.bits == 8 or scheme.group_size % 2 == 1


def _sizes(scheme: QuantScheme, in_features: int) -> list[int]:
    """Codes of each group, the last one without its padding."""
    group = table_group(scheme, in_features)
    return [min(group, in_features - start) for start in range(0, in_features, group)]


def _record_bytes(scheme: QuantScheme, size: int) -> int:
    header = TILE_ROWS * (4 if scheme.symmetric else 5)
    return header + TILE_ROWS * (size if _is_whole(scheme) else -(-size // 2))


def _by_tile(part: NDArray[_T], scheme: QuantScheme, out_features: int) -> NDArray[_T]:
    """Scales or zeros by row, as `[tiles, 32, groups]`; those of rows beyond the last are 0."""
    num_tiles = -(-out_features // TILE_ROWS)
    rows = np.repeat(part, scheme.block_rows or 1, axis=0)[:out_features]
    out = np.zeros((num_tiles * TILE_ROWS, part.shape[1]), dtype=part.dtype)
    out[:out_features] = rows
    return out.reshape(num_tiles, TILE_ROWS, -1)


def _zero(scheme: QuantScheme) -> int:
    """The code of value zero, as the stream has it."""
    table = codebook(scheme.code_type)
    if table:
        return table.index(0.0)
    return 1 << (scheme.bits - 1) if scheme.code_type == "int" and scheme.symmetric else 0


def _bytes_of(codes: Bytes, scheme: QuantScheme) -> Bytes:
    """A byte a code: nibbles apart, signed bytes with 128 added."""
    if scheme.bits == 8:
        return codes ^ np.uint8(0x80) if scheme.code_type == "int" and scheme.symmetric else codes
    return np.stack((codes & _LOW, codes >> _FOUR), axis=2).reshape(codes.shape[0], -1)


def _portable(codes: Bytes, scheme: QuantScheme) -> Bytes:
    if scheme.bits == 8:
        return _bytes_of(codes, scheme)
    return cast(Bytes, codes[:, 0::2] | (codes[:, 1::2] << _FOUR))
