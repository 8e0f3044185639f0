"""Quantised matrices as tensors: the portable packing of codes, and its inverse.

A matrix `[N, K]` is stored as `codes` (int8 `[N, Kp]` for 8 bits, uint8 `[N, Kp / 2]` for 4 and 3
bits: even column in the low nibble), `scales [N, groups]`, and uint8 `zeros [N, groups]` when asymmetric.
Signed 4 and 3 bit codes are stored with 2**(bits-1) added; Kp = `scheme.padded_in_features(K)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec.quant import QuantScheme
from .bands import map_bands


class QTensor(NamedTuple):
    """A quantised matrix in the portable packing; `zeros` is None when symmetric."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def pack_codes(codes_NK: Tensor, scheme: QuantScheme) -> Tensor:
    """Pack integer codes `[N, K]` (signed if symmetric, else unsigned) to storage; pads K with zero codes."""
    padded = scheme.padded_in_features(codes_NK.shape[1])
    codes_NK = F.pad(codes_NK.to(torch.int16), (0, padded - codes_NK.shape[1]))
    if scheme.bits == 8:
        return codes_NK.to(torch.int8 if scheme.symmetric else torch.uint8)
    stored = codes_NK + (1 << (scheme.bits - 1)) if scheme.symmetric else codes_NK
    return (stored[:, 0::2] | (stored[:, 1::2] << 4)).to(torch.uint8)


def unpack_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Inverse of `pack_codes`, padding included: int16 `[N, Kp]`."""
    if scheme.bits == 8:
        return codes.to(torch.int16)
    both = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(-2).to(torch.int16)
    return both - (1 << (scheme.bits - 1)) if scheme.symmetric else both


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
    out = torch.empty((codes.shape[0], in_features), dtype=dtype)

    def fill(rows: slice) -> None:
        own_zeros = None if zeros is None else zeros[rows]
        out[rows] = _dequantize_band(codes[rows], scales[rows], own_zeros, scheme)[:, :in_features]

    map_bands(fill, codes.shape[0], scheme.padded_in_features(in_features))
    return out


def _dequantize_band(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    values = unpack_codes(codes, scheme).float()
    groups = scales.shape[1]
    size = scheme.group_size or values.shape[1]
    grouped = values[:, : groups * size].reshape(values.shape[0], groups, size)
    if zeros is not None:
        grouped = grouped - zeros.float()[:, :, None]
    return (grouped * scales.float()[:, :, None]).reshape(values.shape[0], -1)


def quantize_rtn(weight_NK: Tensor, scheme: QuantScheme) -> QTensor:
    """Round-to-nearest codes of `weight [N, K]`.

    Symmetric: the element of largest magnitude of each group maps to -2**(bits-1), so the full range is
    used; asymmetric: [min, max] with zero inside maps to [0, 2**bits - 1]. The scale is rounded
    to its stored dtype before codes are found. A group of zeros gets scale 1.
    """
    num_rows, in_features = weight_NK.shape
    groups = scheme.num_groups(in_features)
    size = scheme.group_size or in_features
    grouped = F.pad(weight_NK.float(), (0, groups * size - in_features)).reshape(num_rows, groups, size)
    scale_dtype = getattr(torch, scheme.scale_dtype)
    if scheme.symmetric:
        scales, codes, zeros = _symmetric(grouped, scheme, scale_dtype)
    else:
        scales, codes, zeros = _asymmetric(grouped, scheme, scale_dtype)
    flat = codes.reshape(num_rows, groups * size)[:, :in_features]
    return QTensor(pack_codes(flat, scheme), scales, zeros)


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


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    stored = scales.clamp(-limits.max, limits.max).to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)
