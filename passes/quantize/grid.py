"""The grid that a matrix is rounded to, one scale (and zero point) a group, and rounding onto it.

Shape letters: N rows, K columns, G groups of S columns each (the last padded). Knows no data and no graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.quantized import QTensor, pack_codes, quantize_rtn
from ...spec.quant import QuantScheme


class Grid(NamedTuple):
    """`scales[N, G]` in float32, each exactly a value of the scheme's scale dtype, and `zeros[N, G]`, whole
    numbers in float32, None when symmetric."""

    scales: Tensor
    zeros: Tensor | None


def code_range(scheme: QuantScheme) -> tuple[int, int]:
    """The least and the largest integer code."""
    if scheme.symmetric:
        return -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    return 0, (1 << scheme.bits) - 1


def rtn_grid(weight_NK: Tensor, scheme: QuantScheme) -> Grid:
    """The grid of rounding to nearest, as `ir.quantized.quantize_rtn` defines it."""
    rounded = quantize_rtn(weight_NK, scheme)
    return Grid(rounded.scales.float(), None if rounded.zeros is None else rounded.zeros.float())


def storable(scales: Tensor, scheme: QuantScheme, fallback: Tensor) -> Tensor:
    """`scales` rounded to their stored dtype; `fallback` where that is zero or not finite."""
    dtype = getattr(torch, scheme.scale_dtype)
    stored = scales.to(dtype).float()
    return torch.where((stored != 0) & stored.isfinite(), stored, fallback)


def split_groups(weight_NK: Tensor, scheme: QuantScheme) -> Tensor:
    """`[N, G, S]` of `[N, K]`, the last group padded with zeros."""
    num_rows, width = weight_NK.shape
    size = scheme.group_size or width
    groups = scheme.num_groups(width)
    return F.pad(weight_NK, (0, groups * size - width)).reshape(num_rows, groups, size)


def by_column(values_NG: Tensor, scheme: QuantScheme, width: int) -> Tensor:
    """`[N, K]`: what each group has, for each of its columns."""
    if values_NG.shape[1] == 1:
        return values_NG.expand(-1, width)
    return values_NG.repeat_interleave(scheme.group_size, dim=1)[:, :width]


def nearest_codes(weight_NK: Tensor, grid: Grid, scheme: QuantScheme) -> Tensor:
    """The codes nearest to `weight`, whole numbers in float32 `[N, K]`."""
    width = weight_NK.shape[1]
    codes = weight_NK / by_column(grid.scales, scheme, width)
    if grid.zeros is not None:
        codes = codes + by_column(grid.zeros, scheme, width)
    return codes.round_().clamp_(*code_range(scheme))


def values_of(codes_NK: Tensor, grid: Grid, scheme: QuantScheme) -> Tensor:
    """What `codes` stand for, in float32 `[N, K]`."""
    width = codes_NK.shape[1]
    if grid.zeros is not None:
        codes_NK = codes_NK - by_column(grid.zeros, scheme, width)
    return codes_NK * by_column(grid.scales, scheme, width)


def pack_grid(codes_NK: Tensor, grid: Grid, scheme: QuantScheme) -> QTensor:
    """Codes on a grid in the portable packing."""
    scales = grid.scales.to(getattr(torch, scheme.scale_dtype))
    zeros = None if grid.zeros is None else grid.zeros.to(torch.uint8)
    return QTensor(pack_codes(codes_NK, scheme), scales, zeros)
