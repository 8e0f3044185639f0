"""The weight layouts that CPU kernels read, as bijections of the portable packing, in numpy.

kernels/cpu/layout.hpp draws the layouts. Knows bytes only: no graph, no torch, no file.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..spec.errors import TargetError
from ..spec.quant import QuantScheme

TILE_ROWS = 32
GROUPS = (128, 64, 32)
SLACK_BYTES = 8192  # readable bytes a kernel wants behind every packed array

Bytes = NDArray[np.uint8]
_T = TypeVar("_T", np.float16, np.uint8)


class Codes(NamedTuple):
    """A matrix `[N, K]` in the portable packing of `ir.quantized`, as arrays. `codes` is int8 or uint8
    `[N, Kp]` for 8 bits, uint8 `[N, Kp / 2]` for fewer; `scales` float16 `[N, groups]`; `zeros` uint8
    `[N, groups]`, None when symmetric."""

    codes: NDArray[np.int8] | Bytes
    scales: NDArray[np.float16]
    zeros: Bytes | None


class Layout(NamedTuple):
    """Shape of a packed integer matrix. `bits` is 4 or 8, `group` the codes that share a scale in the
    stream; the scale of a longer group of the scheme is repeated."""

    bits: int
    group: int
    zeros: bool

    @property
    def name(self) -> str:
        """As artifacts record it: w4t32_g32, w8t32_g128_zeros."""
        return f"w{self.bits}t32_g{self.group}" + ("_zeros" if self.zeros else "")

    @property
    def header_bytes(self) -> int:
        """Scales, and zero points where there are any, of one tile and group."""
        return 2 * TILE_ROWS + (TILE_ROWS if self.zeros else 0)

    def num_groups(self, in_features: int) -> int:
        """Groups along K in the packed stream."""
        return -(-in_features // self.group)

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Size of the packed matrix, without the slack that must be readable behind it."""
        record = self.header_bytes + TILE_ROWS * self.group * self.bits // 8
        return -(-out_features // TILE_ROWS) * self.num_groups(in_features) * record


def layout_of(scheme: QuantScheme) -> Layout:
    """The layout for codes of `scheme`. Raises TargetError where kernels have none."""
    if scheme.scale_dtype != "float16":
        raise TargetError(
            "target.scale_dtype",
            f"The CPU target cannot run {scheme.name} with {scheme.scale_dtype} scales.",
            "Its kernels read float16 scales.",
            "Quantise with float16 scales.",
        )
    if scheme.code_type != "int":
        raise _no_layout(scheme, "its kernels read integer codes")
    if scheme.block_rows:
        raise _no_layout(scheme, "its kernels read a scale for each row")
    if scheme.bits > 8:
        raise _no_layout(scheme, "its kernels read codes of at most 8 bits")
    for group in GROUPS:
        if scheme.group_size % group == 0:  # 0, one scale a row, takes the longest
            return Layout(bits=8 if scheme.bits > 4 else 4, group=group, zeros=not scheme.symmetric)
    raise _no_layout(scheme, "its groups must be multiples of 32")


def has_layout(scheme: QuantScheme) -> bool:
    """Whether integer kernels read codes of `scheme`."""
    whole = scheme.code_type == "int" and scheme.scale_dtype == "float16" and not scheme.block_rows
    return whole and scheme.bits <= 8 and any(scheme.group_size % group == 0 for group in GROUPS)


def _no_layout(scheme: QuantScheme, why: str) -> TargetError:
    return TargetError(
        "target.scheme",
        f"The CPU target cannot run {scheme.name}.",
        f"It has no layout for the scheme: {why}.",
        "Choose a scheme such as int4_g32, int4_g128 or int8_g32.",
    )


def pack(matrix: Codes, scheme: QuantScheme, in_features: int) -> Bytes:
    """`matrix` in the layout of `scheme`: uint8 `[bytes]`. Rows are padded to 32 and K to whole groups
    with codes of value zero; padding rows have scale 0."""
    layout = layout_of(scheme)
    num_rows = matrix.codes.shape[0]
    _check_shapes(matrix, scheme, in_features)
    num_tiles, num_groups = -(-num_rows // TILE_ROWS), layout.num_groups(in_features)
    stored = _stored_codes(matrix.codes, scheme)
    padded = np.full(
        (num_tiles * TILE_ROWS, num_groups * layout.group),
        0 if layout.zeros else _offset(layout),
        dtype=np.uint8,
    )
    padded[:num_rows, : stored.shape[1]] = stored[:, : padded.shape[1]]
    scales = _per_layout_group(matrix.scales, scheme, layout, num_tiles, num_groups)
    parts = [np.ascontiguousarray(_by_tile(scales)).view(np.uint8)]
    if matrix.zeros is not None:
        zeros = _per_layout_group(matrix.zeros, scheme, layout, num_tiles, num_groups)
        parts.append(np.ascontiguousarray(_by_tile(zeros)))
    parts.append(_interleave(padded, layout, num_tiles, num_groups))
    return np.concatenate(parts, axis=2).reshape(-1)


def unpack(packed: Bytes, scheme: QuantScheme, out_features: int, in_features: int) -> Codes:
    """Inverse of `pack`: the portable packing, bit for bit, where its padding is codes of value zero."""
    layout = layout_of(scheme)
    num_tiles, num_groups = -(-out_features // TILE_ROWS), layout.num_groups(in_features)
    records = packed.reshape(num_tiles, num_groups, -1)
    headers = records[:, :, : 2 * TILE_ROWS].copy().view("<f2")
    step = max(1, scheme.group_size // layout.group) if scheme.group_size else num_groups
    scales = _by_row(headers)[:out_features, ::step].copy()
    zeros = None
    if layout.zeros:
        zeros = _by_row(records[:, :, 2 * TILE_ROWS : layout.header_bytes])[:out_features, ::step].copy()
    stored = _deinterleave(records[:, :, layout.header_bytes :], layout, num_tiles, num_groups)
    width = scheme.padded_in_features(in_features)
    whole = np.full((out_features, width), 0 if layout.zeros else _offset(layout), dtype=np.uint8)
    whole[:, : stored.shape[1]] = stored[:out_features, :width]
    return Codes(_portable_codes(whole, scheme), scales, zeros)


def pack_float(weight_NK: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]) -> Bytes:
    """A floating-point matrix in 32-row tiles: float32, float16, or bfloat16 given as its bits (uint16)."""
    num_rows, width = weight_NK.shape
    num_tiles, item = -(-num_rows // TILE_ROWS), weight_NK.dtype.itemsize
    stored = width + width % 2 if item == 2 else width
    padded = np.zeros((num_tiles * TILE_ROWS, stored), dtype=weight_NK.dtype)
    padded[:num_rows, :width] = weight_NK
    if weight_NK.dtype == np.uint16:
        tiles = padded.reshape(num_tiles, 2, 16, stored // 2, 2).transpose(0, 3, 1, 2, 4)
    else:
        tiles = padded.reshape(num_tiles, TILE_ROWS, stored).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles).reshape(-1).view(np.uint8)


def unpack_float(
    packed: Bytes,
    dtype: np.dtype[np.float32] | np.dtype[np.float16] | np.dtype[np.uint16],
    shape: tuple[int, int],
) -> NDArray[np.float32 | np.float16 | np.uint16]:
    """Inverse of `pack_float` for a matrix of `shape` [N, K]."""
    num_rows, width = shape
    num_tiles = -(-num_rows // TILE_ROWS)
    stored = width + width % 2 if dtype.itemsize == 2 else width
    values = packed.view(dtype)
    if dtype == np.uint16:
        tiles = values.reshape(num_tiles, stored // 2, 2, 16, 2).transpose(0, 2, 3, 1, 4)
    else:
        tiles = values.reshape(num_tiles, stored, TILE_ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(tiles.reshape(num_tiles * TILE_ROWS, stored)[:num_rows, :width])


def _check_shapes(matrix: Codes, scheme: QuantScheme, in_features: int) -> None:
    num_rows = matrix.codes.shape[0]
    width = scheme.padded_in_features(in_features) // (1 if scheme.bits == 8 else 2)
    groups = scheme.num_groups(in_features)
    assert matrix.codes.shape == (num_rows, width), (matrix.codes.shape, scheme.name, in_features)
    assert matrix.scales.shape == (num_rows, groups), (matrix.scales.shape, scheme.name, in_features)
    assert (matrix.zeros is None) == scheme.symmetric, "zero points belong to asymmetric schemes"


def _offset(layout: Layout) -> int:
    return 8 if layout.bits == 4 else 128


def _stored_codes(codes: NDArray[np.int8] | Bytes, scheme: QuantScheme) -> Bytes:
    """Unsigned codes `[N, Kp]` as kernels take them: symmetric ones with the layout's offset added."""
    if scheme.bits == 8:
        return codes.view(np.uint8) ^ np.uint8(0x80) if scheme.symmetric else codes.view(np.uint8)
    low, high = np.bitwise_and(codes, 0x0F), np.right_shift(codes, 4)
    nibbles = np.stack((low, high), axis=2).reshape(codes.shape[0], -1).astype(np.uint8)
    return nibbles + np.uint8(8 - (1 << (scheme.bits - 1))) if scheme.symmetric else nibbles


def _portable_codes(stored: Bytes, scheme: QuantScheme) -> NDArray[np.int8] | Bytes:
    if scheme.bits == 8:
        return (stored ^ np.uint8(0x80)).view(np.int8) if scheme.symmetric else stored.copy()
    if scheme.symmetric:
        stored = stored - np.uint8(8 - (1 << (scheme.bits - 1)))
    return cast(Bytes, stored[:, 0::2] | (stored[:, 1::2] << np.uint8(4)))


def _per_layout_group(
    values: NDArray[_T], scheme: QuantScheme, layout: Layout, num_tiles: int, num_groups: int
) -> NDArray[_T]:
    """Values `[N, groups of the scheme]` repeated to `[padded N, groups of the layout]`."""
    repeats = scheme.group_size // layout.group if scheme.group_size else num_groups
    out = np.zeros((num_tiles * TILE_ROWS, num_groups), dtype=values.dtype)
    out[: values.shape[0]] = np.repeat(values, repeats, axis=1)[:, :num_groups]
    return out


def _by_tile(values: NDArray[_T]) -> NDArray[_T]:
    """`[tiles * 32, groups]` to `[tiles, groups, 32]`."""
    return values.reshape(-1, TILE_ROWS, values.shape[1]).transpose(0, 2, 1)


def _by_row(values: NDArray[_T]) -> NDArray[_T]:
    """Inverse of `_by_tile`."""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])


def _interleave(codes: Bytes, layout: Layout, num_tiles: int, num_groups: int) -> Bytes:
    """Codes `[padded N, padded K]` as `[tiles, groups, bytes]`."""
    if layout.bits == 8:
        split = codes.reshape(num_tiles, 2, 16, num_groups, layout.group // 4, 4)
    else:
        nibbles = codes.reshape(num_tiles, 2, 16, num_groups, layout.group // 8, 2, 4)
        split = nibbles[..., 0, :] | (nibbles[..., 1, :] << np.uint8(4))
    vectors = np.ascontiguousarray(split.transpose(0, 3, 4, 1, 2, 5))
    return vectors.reshape(num_tiles, num_groups, -1)


def _deinterleave(streams: Bytes, layout: Layout, num_tiles: int, num_groups: int) -> Bytes:
    vectors = streams.reshape(num_tiles, num_groups, -1, 2, 16, 4).transpose(0, 3, 4, 1, 2, 5)
    if layout.bits == 4:
        vectors = np.stack((vectors & np.uint8(0x0F), vectors >> np.uint8(4)), axis=5)
    return np.ascontiguousarray(cast(Bytes, vectors)).reshape(
        num_tiles * TILE_ROWS, num_groups * layout.group
    )
