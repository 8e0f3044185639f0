"""RMS and layer norm, alone or behind a residual addition: one program a row."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow
from .tiles import inverse_rms, weighed


@triton.jit
def scaled(wide, x, weight, offset, CAST_FIRST: tl.constexpr):
    """The norm `wide` of x, float32, by its weight; `CAST_FIRST` is style `cast_then_scale`."""
    if CAST_FIRST:
        scale = (weight.to(tl.float32) + offset).to(weight.dtype)
        return wide.to(x.dtype).to(tl.float32) * scale.to(tl.float32)
    else:
        return wide * (weight.to(tl.float32) + offset)


@triton.jit
def normalize(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    eps,
    offset,
    x_stride: tl.constexpr,
    residual_stride: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """`llmc.rms_norm`, `llmc.layer_norm` (`CENTRED`) and their `add_` forms (`ADDS`) of rows `[WIDTH]`.

    Grid (rows,). Strides are in elements between rows; `out` and `total` are dense. Statistics are float32.
    `CAST_FIRST` is style `cast_then_scale`.
    """
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * WIDTH + column, x, mask=inside)
    wide = x.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    wide = wide * (1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + eps))
    element = out_ptr.dtype.element_ty
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        wide = scaled(wide, x, weight, offset, CAST_FIRST)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if CAST_FIRST:
            wide = wide.to(element).to(tl.float32)
        wide = wide + bias
    tl.store(out_ptr + row * WIDTH + column, wide.to(element), mask=inside)


@triton.jit
def weigh_rows(
    x_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    eps,
    offset,
    x_stride: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """An RMS norm in two factors, for products that multiply their sums by one of them: `out = x * (weight +
    offset)` `[rows, WIDTH]` in x's dtype, and float32 `scales[rows]`. Grid (rows,)."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr + row * x_stride
    tl.store(scales_ptr + row, inverse_rms(source, eps, WIDTH))
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(source + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, weighed(x, weight, offset), mask=inside)
