"""Rows of values to codes of 8 bits and a scale, and codes back to values; e4m3 by its bits, since not every
GPU has the type."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow

# The default of kernels; where the architecture multiplies e4m3, they are compiled with the contrary.
NO_E4M3 = tl.constexpr(False)


@triton.jit
def byte_values(codes, FORM: tl.constexpr):
    """One-byte codes as float32, exactly: int8 through the mantissa of 2**23, e4m3 by moving its fields.

    Integer operations, since conversions issue at a quarter of their rate, and not every GPU has e4m3's.
    """
    if FORM == "int8":
        bits = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32) | 0x4B000000
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32)
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def even(x):
    """float32 values below 2**22 in size, rounded to integers, half to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_codes(x):
    """float32 values as e4m3 codes, uint8: to nearest, half to even, larger ones to the largest, 448."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # The exponent's bias falls from 127 to 7, and 20 bits of the mantissa go.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = even(size * 512.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    return (code | tl.where(x < 0.0, 0x80, 0)).to(tl.uint8)


@triton.jit
def coded_row(x, FORM: tl.constexpr):
    """Codes of float32 `x[n]` with the largest magnitude on the top code, and their scale, as
    `ir.rounded.code_groups`: 0 for a row of next to nothing, NaN where a value is not finite."""
    top_code: tl.constexpr = 127.0 if FORM == "int8" else 448.0  # pyright: ignore[reportAssignmentType]
    top = tl.max(tl.abs(x), 0)
    broken = tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 0) != 0
    kept = (top >= 1e-30) & (broken == 0)
    divisor = tl.where(kept, top, 1.0)
    scale = tl.div_rn(divisor, tl.full([], top_code, tl.float32))
    sane = tl.where(kept, x, 0.0)
    if FORM == "int8":
        factor = tl.div_rn(tl.full([], top_code, tl.float32), divisor)
        codes = even(sane * factor).to(tl.int8)
    else:
        codes = e4m3_codes(tl.div_rn(sane, tl.zeros_like(sane) + scale))
    return codes, tl.where(broken, float("nan"), tl.where(kept, scale, 0.0))


@triton.jit
def round_rows(
    x_ptr,
    static_ptr,
    norm_ptr,
    codes_ptr,
    scales_ptr,
    eps,
    offset,
    x_stride: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    STATIC: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """Codes `[rows, WIDTH]` and float32 scales `[rows]` of rows of x, or of their RMS norm (`NORM`), whose
    result is rounded to x's dtype first; `STATIC` e4m3 takes the one scale that is given, and saturates. Grid
    (rows,)."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    given = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    x = given.to(tl.float32)
    if NORM:
        weight = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + eps)) * (weight + offset)
        x = x.to(given.dtype).to(tl.float32)
    if STATIC:
        scale = tl.load(static_ptr)
        codes = e4m3_codes(tl.div_rn(x, tl.zeros_like(x) + scale))
    else:
        found = coded_row(x, FORM)
        codes = found[0]
        scale = found[1]
    tl.store(codes_ptr + row * WIDTH + column, codes, mask=inside)
    tl.store(scales_ptr + row, scale)
