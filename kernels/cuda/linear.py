"""Matrix products `x[M, K] @ weight[N, K].T`. The weight is the left operand, so that few rows of x still use
the widest matrix instructions, and every element is summed over K in one order, whatever M is."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import byte_values
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
def rows_of_tile(experts_ptr, pairs_ptr, M, x_stride: tl.constexpr, BM: tl.constexpr, SHARED: tl.constexpr):
    """Of this program's tile: its rows of y (M where there is none), where x has them, and its expert, -1
    where the tile is nobody's. Without `SHARED` tiles follow each other, and all are of expert 0."""
    tile = tl.program_id(1)
    row = tile * BM + tl.arange(0, BM)
    expert = tile * 0
    source = row
    if SHARED > 0:
        expert = tl.load(experts_ptr + tile)
        pair = tl.load(pairs_ptr + row, mask=row >= tl.where(expert < 0, row + 1, 0), other=-1)
        row = tl.where(pair < 0, M, pair)
        source = row // SHARED
    return row, source.to(tl.int64) * x_stride, expert


@triton.jit
def load_rows(x_ptr, row, at, k, M, K: tl.constexpr, FULL: tl.constexpr):
    """`x[k, row]` of rows that start at `at`, 0 outside; `FULL` says that every `k` is below K."""
    address = at[None, :] + k[:, None]
    if FULL:
        return tl.load(x_ptr + address, mask=row[None, :] < M, other=0.0)
    else:
        return tl.load(x_ptr + address, mask=(row[None, :] < M) & (k[:, None] < K), other=0.0)


@triton.jit
def linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    experts_ptr,
    pairs_ptr,
    M,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """`llmc.linear` over a dense floating-point weight, or with `SHARED` the experts' own. Grid (ceil(N /
    BN), tiles of BM rows)."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    stop = K
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, K)
        weight_ptr += tl.maximum(expert, 0).to(tl.int64) * (N * K)
        if HAS_BIAS:
            bias_ptr += tl.maximum(expert, 0) * N
    depth = tl.arange(0, BK)
    sums = tl.zeros([BN, BM], tl.float32)
    # Rows that do not exist read the last one: a mask would cost more, and their sums are not stored.
    held = tl.minimum(column, N - 1).to(tl.int64)
    for start in tl.range(0, stop, BK):
        k = start + depth
        address = held[:, None] * K + k[None, :]
        if K % BK == 0:
            w = tl.load(weight_ptr + address)
        else:
            w = tl.load(weight_ptr + address, mask=k[None, :] < K, other=0.0)
        x = load_rows(x_ptr, row, at, k, M, K, K % BK == 0)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)


@triton.jit
def word_group(
    words,
    scale,
    lift,
    x_ptr,
    row,
    at,
    k0,
    M,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    DIGITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """`scale[BN] * sum((code - zero) * x)` over `DIGITS` digits from `FIRST` on, which share a group.

    `lift` is 128 plus the zero point, of each row or of all; both terms of the difference are exact in
    bfloat16.
    """
    depth = tl.arange(0, 32)
    part = tl.zeros([BN, BM], tl.float32)
    for digit in tl.static_range(FIRST, FIRST + DIGITS):  # pyright: ignore[reportGeneralTypeIssues]
        codes = (word_pairs(words, digit, BN) - lift).to(tl.bfloat16)
        x = load_rows(x_ptr, row, at, k0 + 32 * digit + depth, M, K, K % 128 == 0)
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
    experts_ptr,
    pairs_ptr,
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
    SHARED: tl.constexpr,
):
    """`llmc.quantized_linear` over codes of at most 4 bits in words `[N, 16 * BLOCKS]`.

    The sum over the exact codes of a group, or of a block where groups are larger, is multiplied once by its
    scale `[N, GROUPS]`. `DIGITS` of a block share a group of `GROUP`. Symmetric codes are stored `ZERO`
    higher; otherwise zero points are uint8 `[N, GROUPS]`. Grid as `linear`.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    stop = BLOCKS
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, BLOCKS)
        first_row = tl.maximum(expert, 0).to(tl.int64) * N
        words_ptr += first_row * (BLOCKS * 16)
        scales_ptr += first_row * GROUPS
        if not SYMMETRIC:
            zeros_ptr += first_row * GROUPS
        if HAS_BIAS:
            bias_ptr += first_row
    word = tl.arange(0, 16)
    held = tl.minimum(column, N - 1).to(tl.int64)
    sums = tl.zeros([BN, BM], tl.float32)
    for block in tl.range(0, stop, loop_unroll_factor=4):  # half of a turn is not for its weights: share it
        words = tl.load(words_ptr + held[:, None] * (BLOCKS * 16) + (block * 16 + word)[None, :])
        for first in tl.static_range(0, 4, DIGITS):  # pyright: ignore[reportGeneralTypeIssues]
            # The groups of what fills the last block do not exist, and x is 0 there.
            group = tl.minimum((block * 128 + 32 * first) // GROUP, GROUPS - 1)
            scale = tl.load(scales_ptr + held * GROUPS + group)
            if SYMMETRIC:
                lift = tl.full([1, 1], 128 + ZERO, tl.bfloat16)
            else:
                zero = tl.load(zeros_ptr + held * GROUPS + group).to(tl.float32)
                lift = (zero + 128.0).to(tl.bfloat16)[:, None]
            given = (words, scale, lift, x_ptr, row, at, block * 128, M)
            sums += word_group(*given, K, first, DIGITS, BN, BM)
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)


@triton.jit
def linear_bytes(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    experts_ptr,
    pairs_ptr,
    M,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """`llmc.quantized_linear` over symmetric one-byte codes `[N, STORED]`, scales `[N, GROUPS]`.

    `FORM` is `int8` or `fp8` (e4m3, given as bytes). A group is summed in steps of `BK` and multiplied by its
    scale once. Grid as `linear`.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    stop = GROUPS
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, GROUPS)
        first_row = tl.maximum(expert, 0).to(tl.int64) * N
        codes_ptr += first_row * STORED
        scales_ptr += first_row * GROUPS
        if HAS_BIAS:
            bias_ptr += first_row
    depth = tl.arange(0, BK)
    held = tl.minimum(column, N - 1).to(tl.int64)
    sums = tl.zeros([BN, BM], tl.float32)
    for group in tl.range(0, stop):
        part = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, GROUP, BK):
            k = group * GROUP + start + depth
            address = held[:, None] * STORED + k[None, :]
            if GROUP % BK == 0 and GROUPS * GROUP <= STORED:
                codes = tl.load(codes_ptr + address)
            else:
                codes = tl.load(codes_ptr + address, mask=k[None, :] < STORED, other=0)
            x = load_rows(x_ptr, row, at, k, M, K, GROUP % BK == 0 and GROUPS * GROUP <= K)
            part = tl.dot(byte_values(codes, FORM).to(x.dtype), x, part, input_precision="ieee")
        sums += part * tl.load(scales_ptr + held * GROUPS + group).to(tl.float32)[:, None]
    store_rows(y_ptr, bias_ptr, sums, row, column, M, N, HAS_BIAS)


@triton.jit
def linear_rounded(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    X_FORM: tl.constexpr,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`llmc.quantized_linear` over one-byte codes of the weight, as `linear_bytes`, and of dense `x[M, K]`
    with float32 `x_scales[M]`.

    int8 by int8 is summed in integers, exactly; others as bfloat16, which holds every code. Grid as `linear`.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    held = tl.minimum(column, N - 1).to(tl.int64)
    sums = tl.zeros([BN, BM], tl.float32)
    integers: tl.constexpr = X_FORM == "int8" and FORM == "int8"
    for group in tl.range(0, GROUPS):
        part = tl.zeros([BN, BM], tl.int32 if integers else tl.float32)
        for start in tl.range(0, GROUP, BK):
            k = group * GROUP + start + depth
            address = held[:, None] * STORED + k[None, :]
            full: tl.constexpr = GROUP % BK == 0 and GROUPS * GROUP <= STORED and GROUPS * GROUP <= K
            if full:
                codes = tl.load(codes_ptr + address)
            else:
                codes = tl.load(codes_ptr + address, mask=k[None, :] < STORED, other=0)
            x = load_rows(x_ptr, row, row.to(tl.int64) * K, k, M, K, full)
            if integers:
                part = tl.dot(codes, x, part, out_dtype=tl.int32)
            else:
                left = byte_values(codes, FORM).to(tl.bfloat16)
                part = tl.dot(left, byte_values(x, X_FORM).to(tl.bfloat16), part)
        scale = tl.load(scales_ptr + held * GROUPS + group).to(tl.float32)
        sums += part.to(tl.float32) * scale[:, None]
    x_scale = tl.load(x_scales_ptr + row, mask=row < M, other=0.0)
    sums = sums * x_scale[None, :]
    element = y_ptr.dtype.element_ty
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    inside = (row[None, :] < M) & (column[:, None] < N)
    tl.store(y_ptr + row[None, :].to(tl.int64) * N + column[:, None], sums.to(element), mask=inside)
