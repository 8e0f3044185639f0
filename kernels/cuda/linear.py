"""Matrix products `x[M, K] @ weight[N, K].T`. The weight is the left operand, so that few rows of x still use
the widest matrix instructions, and every element is summed over K in one order, whatever M is."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .words import word_pairs


@triton.jit
def store_rows(y_ptr, bias_ptr, sums, row, column, M, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Round `sums[columns, rows]` to y's dtype, add the bias there, and store to dense `y[M, N]`."""
    element = y_ptr.dtype.element_ty
    out = sums.to(element)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
        out = (out.to(tl.float32) + bias.to(tl.float32)[:, None]).to(element)
    inside = (row[None, :] < M) & (column[:, None] < N)
    tl.store(y_ptr + row[None, :].to(tl.int64) * N + column[:, None], out, mask=inside)


@triton.jit
def linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`llmc.linear` over a dense floating-point weight. Grid (ceil(N / BN), ceil(M / BM))."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    sums = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, K, BK):
        k = start + depth
        w_mask = (column[:, None] < N) & (k[None, :] < K)
        x_mask = (row[None, :] < M) & (k[:, None] < K)
        w = tl.load(weight_ptr + column[:, None].to(tl.int64) * K + k[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_ptr + row[None, :].to(tl.int64) * x_stride + k[:, None], mask=x_mask, other=0.0)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)


@triton.jit
def word_group(
    words,
    scale,
    lift,
    x_ptr,
    row,
    k0,
    M,
    x_stride: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    DIGITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """`scale[BN] * sum((code - zero) * x)` over `DIGITS` digits of a block from `FIRST` on, which share a
    group.

    `lift[BN]` is 128 plus the zero point; both terms of the difference are exact in bfloat16.
    """
    depth = tl.arange(0, 32)
    part = tl.zeros([BN, BM], tl.float32)
    for digit in tl.static_range(FIRST, FIRST + DIGITS):  # pyright: ignore[reportGeneralTypeIssues]
        codes = (word_pairs(words, digit, BN) - lift[:, None]).to(tl.bfloat16)
        k = k0 + 32 * digit + depth
        x_mask = (row[None, :] < M) & (k[:, None] < K)
        x = tl.load(x_ptr + row[None, :].to(tl.int64) * x_stride + k[:, None], mask=x_mask, other=0.0)
        part = tl.dot(codes.to(x.dtype), x, part, input_precision="ieee")
    return part * scale.to(tl.float32)[:, None]


@triton.jit
def linear_words(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    M,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    DIGITS: tl.constexpr,
    ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`llmc.quantized_linear` over codes of at most 4 bits in words `[N, 16 * BLOCKS]`.

    The sum over the exact codes of a group, or of a block where groups are larger, is multiplied by its scale
    `[N, GROUPS]` once. `DIGITS` of a block share a group of `GROUP`. Symmetric codes are stored `ZERO`
    higher; otherwise zero points are uint8 `[N, GROUPS]`. Grid as `linear`.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    word = tl.arange(0, 16)
    exists = column < N
    wide_column = column.to(tl.int64)
    sums = tl.zeros([BN, BM], tl.float32)
    for block in tl.range(0, BLOCKS):
        address = wide_column[:, None] * (BLOCKS * 16) + (block * 16 + word)[None, :]
        words = tl.load(words_ptr + address, mask=exists[:, None], other=0)
        for first in tl.static_range(0, 4, DIGITS):  # pyright: ignore[reportGeneralTypeIssues]
            group = (block * 128 + 32 * first) // GROUP
            stored = exists & (group < GROUPS)
            scale = tl.load(scales_ptr + wide_column * GROUPS + group, mask=stored, other=0.0)
            lift = tl.full([BN], 128 + ZERO, tl.bfloat16)
            if not SYMMETRIC:
                zero = tl.load(zeros_ptr + wide_column * GROUPS + group, mask=stored, other=0)
                lift = (zero.to(tl.float32) + 128.0).to(tl.bfloat16)
            sums += word_group(
                words, scale, lift, x_ptr, row, block * 128, M, x_stride, K, first, DIGITS, BN, BM
            )
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)


@triton.jit
def linear_bytes(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    M,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`llmc.quantized_linear` over symmetric one-byte codes `[N, GROUPS * GROUP]` (int8 or e4m3), scales
    `[N, GROUPS]`.

    A group is summed in steps of `BK`, which divides it, and multiplied by its scale once. Grid as `linear`.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    exists = column < N
    wide_column = column.to(tl.int64)
    sums = tl.zeros([BN, BM], tl.float32)
    for group in tl.range(0, GROUPS):
        part = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, GROUP, BK):
            k = group * GROUP + start + depth
            address = wide_column[:, None] * (GROUPS * GROUP) + k[None, :]
            codes = tl.load(codes_ptr + address, mask=exists[:, None], other=0.0)
            x_mask = (row[None, :] < M) & (k[:, None] < K)
            x = tl.load(x_ptr + row[None, :].to(tl.int64) * x_stride + k[:, None], mask=x_mask, other=0.0)
            part = tl.dot(codes.to(tl.float32).to(x.dtype), x, part, input_precision="ieee")
        scale = tl.load(scales_ptr + wide_column * GROUPS + group, mask=exists, other=0.0)
        sums += part * scale.to(tl.float32)[:, None]
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)
