"""Quantised matrices as tensors: the portable packing of codes, and its inverse.

A matrix `[N, K]` is stored as `codes` of `code_dtype`, those of fewer than 8 bits as uint8 `[N, Kp / 2]` with
the even column in the low nibble; `scales [N, groups]`, for blocks `[N / block_rows, groups]`; and uint8
`zeros` like `scales` when asymmetric. Signed 4 and 3 bit codes are stored with 2**(bits-1) added; Kp is
`scheme.padded_in_features(K)`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec.quant import QuantScheme, codebook
from .bands import map_bands

FP8 = torch.float8_e4m3fn
FP8_TOP = 448.0
_E8M0 = torch.float8_e8m0fnu


class QTensor(NamedTuple):
    """A quantised matrix in the portable packing; `zeros` is None when symmetric."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def code_dtype(scheme: QuantScheme) -> torch.dtype:
    """The dtype that stored codes have."""
    if scheme.code_type == "fp8":
        return FP8
    return torch.int8 if scheme.bits == 8 and scheme.symmetric else torch.uint8


def part_shape(shape: tuple[int, ...], scheme: QuantScheme, part: str) -> tuple[int, ...]:
    """Shape of `codes`, `scales` or `zeros` of a weight `[..., N, K]`."""
    *lead, rows, width = shape
    if part != "codes":
        return (*lead, scheme.num_scale_rows(rows), scheme.num_groups(width))
    stored = scheme.padded_in_features(width)
    return (*lead, rows, stored if scheme.bits == 8 else stored // 2)


def part_dtype(scheme: QuantScheme, part: str) -> torch.dtype:
    """Dtype of `codes`, `scales` or `zeros`."""
    if part == "codes":
        return code_dtype(scheme)
    return torch.uint8 if part == "zeros" else getattr(torch, scheme.scale_dtype)


def pack_codes(codes_NK: Tensor, scheme: QuantScheme) -> Tensor:
    """Pack codes `[N, K]` (integers, signed if symmetric; indexes of a table; e4m3 values) to storage; pads K
    with codes of value zero."""
    if scheme.code_type == "fp8":
        return codes_NK.to(FP8)
    padding = scheme.padded_in_features(codes_NK.shape[1]) - codes_NK.shape[1]
    codes_NK = F.pad(codes_NK.to(torch.int16), (0, padding), value=_zero_code(scheme))
    if scheme.bits == 8:
        return codes_NK.to(code_dtype(scheme))
    stored = codes_NK + _offset(scheme)
    return (stored[:, 0::2] | (stored[:, 1::2] << 4)).to(torch.uint8)


def unpack_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Inverse of `pack_codes`, padding included: int16 `[N, Kp]`, or e4m3."""
    if scheme.code_type == "fp8":
        return codes
    if scheme.bits == 8:
        return codes.to(torch.int16)
    both = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2).to(torch.int16)
    return both - _offset(scheme)


def _offset(scheme: QuantScheme) -> int:
    """What is added to a signed code of fewer than 8 bits to store it."""
    return 1 << (scheme.bits - 1) if scheme.code_type == "int" and scheme.symmetric else 0


def _zero_code(scheme: QuantScheme) -> int:
    table = codebook(scheme.code_type)
    return table.index(0.0) if table else 0


def take_rows(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme, ids: Tensor, in_features: int
) -> Tensor:
    """Values `[ids, in_features]` of some rows of packed `codes`, in float32."""
    owners = ids // scheme.block_rows if scheme.block_rows else ids
    own_zeros = None if zeros is None else zeros[owners]
    by_row = replace(scheme, block_rows=0)
    return dequantize_rows(codes[ids], scales[owners], own_zeros, by_row, in_features)


def dequantize_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: QuantScheme,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values `[N, in_features]` of packed `codes`: `(code - zero) * scale` in float32, rounded to `dtype`.

    Works in bands of rows, so that a large table takes little more memory than its result.
    """
    if scheme.block_rows:
        num_rows, times = codes.shape[0], scheme.block_rows
        scales = scales.repeat_interleave(times, 0)[:num_rows]
        zeros = None if zeros is None else zeros.repeat_interleave(times, 0)[:num_rows]
    out = torch.empty((codes.shape[0], in_features), dtype=dtype)

    def fill(rows: slice) -> None:
        own_zeros = None if zeros is None else zeros[rows]
        out[rows] = _dequantize_band(codes[rows], scales[rows], own_zeros, scheme)[:, :in_features]

    map_bands(fill, codes.shape[0], scheme.padded_in_features(in_features))
    return out


def _dequantize_band(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    values = _values(unpack_codes(codes, scheme), scheme)
    num_rows, groups = scales.shape
    size = scheme.group_size or values.shape[1]
    short = groups * size - values.shape[1]
    grouped = (F.pad(values, (0, short)) if short else values).reshape(num_rows, groups, size)
    if zeros is not None:
        grouped = grouped - zeros.float()[:, :, None]
    return (grouped * scales.float()[:, :, None]).reshape(num_rows, -1)


def _values(codes: Tensor, scheme: QuantScheme) -> Tensor:
    table = codebook(scheme.code_type)
    return torch.tensor(table)[codes.long()] if table else codes.float()


def quantize_rtn(weight_NK: Tensor, scheme: QuantScheme) -> QTensor:
    """Round-to-nearest codes of `weight [N, K]`.

    Symmetric integers: the element of largest magnitude of each group maps to -2**(bits-1), so the full range
    is used; asymmetric ones: [min, max] with zero inside maps to [0, 2**bits - 1]. Floating-point codes and
    tables: the largest magnitude maps to the largest value. The scale is rounded to its stored dtype before
    codes are found. A group of zeros gets scale 1.
    """
    num_rows, in_features = weight_NK.shape
    grouped = _grouped(weight_NK.float(), scheme)
    scale_dtype = getattr(torch, scheme.scale_dtype)
    if scheme.code_type != "int":
        scales, codes, zeros = _floating(grouped, scheme, scale_dtype)
    elif scheme.symmetric:
        scales, codes, zeros = _symmetric(grouped, scheme, scale_dtype)
    else:
        scales, codes, zeros = _asymmetric(grouped, scheme, scale_dtype)
    flat = _ungrouped(codes, scheme)[:num_rows, :in_features]
    return QTensor(pack_codes(flat, scheme), scales, zeros)


def _grouped(weight_NK: Tensor, scheme: QuantScheme) -> Tensor:
    """`[scale rows, groups, values that share a scale]`, padded with zeros."""
    num_rows, in_features = weight_NK.shape
    size, height = scheme.group_size or in_features, scheme.block_rows or 1
    tall = scheme.num_scale_rows(num_rows) * height - num_rows
    padded = F.pad(weight_NK, (0, scheme.num_groups(in_features) * size - in_features, 0, tall))
    blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, size))
    return blocks.transpose(1, 2).flatten(2)


def _ungrouped(codes: Tensor, scheme: QuantScheme) -> Tensor:
    height = scheme.block_rows or 1
    return codes.unflatten(2, (height, -1)).transpose(1, 2).flatten(2).flatten(0, 1)


def _symmetric(grouped: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, None]:
    low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    extreme = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))[:, :, 0]
    scales = _storable(extreme / low, dtype)
    codes = (grouped / scales.float()[:, :, None]).round().clamp(low, high)
    return scales, codes.to(torch.int16), None


def _asymmetric(grouped: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    high = (1 << scheme.bits) - 1
    smallest, largest = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = _storable((largest - smallest) / high, dtype)
    zeros = (-smallest / scales.float()).round().clamp(0, high)
    codes = (grouped / scales.float()[:, :, None] + zeros[:, :, None]).round().clamp(0, high)
    return scales, codes.to(torch.int16), zeros.to(torch.uint8)


def _floating(grouped: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, None]:
    """The codes of e4m3 come as values, those of a table as indexes."""
    table = codebook(scheme.code_type)
    top = max(table) if table else FP8_TOP
    scales = _storable(grouped.abs().amax(2) / top, dtype)
    scaled = grouped / scales.float()[:, :, None]
    if not table:
        return scales, scaled.clamp(-top, top).to(FP8), None
    ordered = sorted(set(table))
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(ordered)])
    indexes = torch.tensor([table.index(value) for value in ordered], dtype=torch.int16)
    return scales, indexes[torch.bucketize(scaled, middles)], None


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == _E8M0:
        # OCP Microscaling Formats 1.0, section 5.4, but rounded up: nothing saturates
        exponents = torch.where(scales > 0, scales, 1.0).log2().ceil().clamp(-127, 127)
        return torch.exp2(exponents).to(dtype)
    limits = torch.finfo(dtype)
    stored = scales.clamp(-limits.max, limits.max).to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)
