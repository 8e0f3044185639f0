"""Matrix products `x[M, K] @ weight[N, K].T`. The weight is the left operand, so that few rows of x still use
the widest matrix instructions, and every element is summed over K in one order, whatever M is."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow
from .tiles import load_rows, load_tile, rows_of_tile, scales_of_rows, store_rows, sum_parts, weight_rows
from .words import exponents, lifted, scale_of_digits, word_digits


@triton.jit
def dense_part(
    x_ptr,
    norm_ptr,
    weight_ptr,
    row,
    at,
    held,
    first,
    stop,
    M,
    offset,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
):
    """The sum over `first` … `stop` of K, which are multiples of BK but for the end."""
    depth = tl.arange(0, BK)
    sums = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(first, stop, BK):
        k = start + depth
        address = held[:, None] * K + k[None, :]
        if K % BK == 0:
            w = tl.load(weight_ptr + address)
        else:
            w = tl.load(weight_ptr + address, mask=k[None, :] < K, other=0.0)
        x = load_rows(x_ptr, norm_ptr, row, at, k, M, offset, K, K % BK == 0, NORM)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
    return sums


@triton.jit
def linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    norm_ptr,
    row_scales_ptr,
    residual_ptr,
    partial_ptr,
    arrived_ptr,
    experts_ptr,
    pairs_ptr,
    M,
    eps,
    offset,
    x_stride: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    ADDS: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """`llmc.linear` over a dense floating-point weight, or with `SHARED` the experts' own. Grid (ceil(N /
    BN), tiles of BM rows, `APART` ? SPLITS : 1).

    K is summed in `SPLITS` parts, by programs of their own with `APART`. `NORM` is for x whose norm is
    applied "here", by the norm's weight `[K]` (with an "offset"), or "before", which leaves scales of rows
    `[M]`. `GATE` is the activation of a gate, `ADDS` a residual addition.
    """
    follow(PDL)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    held = weight_rows(N, BN, GATE)
    stop = K
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, K)
        weight_ptr += tl.maximum(expert, 0).to(tl.int64) * (N * K)
        if HAS_BIAS:
            bias_ptr += tl.maximum(expert, 0) * N
    scale = scales_of_rows(x_ptr, row_scales_ptr, row, M, eps, x_stride, K, BM, NORM)
    each: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS) * BK
    given = (x_ptr, norm_ptr, weight_ptr, row, at, held)
    sums = tl.zeros([BN, BM], tl.float32)
    own = tl.program_id(2) * each
    for part in tl.range(0, 1 if APART else SPLITS):
        first = own + part * each
        sums += dense_part(*given, first, tl.minimum(first + each, stop), M, offset, K, BM, BN, BK, NORM)
    if APART:
        sums, M = sum_parts(partial_ptr, arrived_ptr, sums, row, M, SPLITS, BN, BM)
    if NORM != "":
        sums = sums * scale[None, :]
    store_rows(y_ptr, bias_ptr, residual_ptr, sums, row, held, M, N, BN, BM, HAS_BIAS, False, GATE, ADDS)


@triton.jit
def block_of_turn(ahead, count, M, EVEN: tl.constexpr):
    """Which block of `count` is loaded, and how many rows it is for: beyond the end the last, for none."""
    if EVEN:
        return ahead, M
    else:
        return tl.minimum(ahead, count - 1), tl.where(ahead < count, M, 0)


@triton.jit
def lifts_of_group(zeros_ptr, group, ones, ZERO: tl.constexpr, SYMMETRIC: tl.constexpr):
    """What lifts the codes of a group: the zero points stored for it, or one for all."""
    if SYMMETRIC:
        return lifted(tl.full([1, 1], ZERO, tl.int32), ones)
    else:
        return lifted(tl.load(zeros_ptr + group).to(tl.int32), ones)[:, None]


@triton.jit
def word_part(
    x_ptr, norm_ptr, words_ptr, scales_ptr, zeros_ptr, row, at, held, start, stop, M, offset, K: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DIGITS: tl.constexpr, ZERO: tl.constexpr,
    SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The sum over blocks `start` … `stop` of 128 codes: of each group `scale * sum((code - zero) * x)`, both
    terms of the difference exact in bfloat16, fused with the addition to the groups before. `EVEN` says that
    they are turns of `UNROLL`; otherwise the last turn's blocks beyond the end add zeros."""
    word = tl.arange(0, 16)
    sums = tl.zeros([BN, BM], tl.float32)
    ones = exponents(M)
    scale_type: tl.constexpr = scales_ptr.dtype.element_ty
    # Scales of a block that lie side by side are one load.
    beside: tl.constexpr = (
        DIGITS < 4 and GROUPS * DIGITS == 4 * BLOCKS and scale_type.primitive_bitwidth == 16
    )
    # Of four zeros, two and two are numbers in the halves of one register.
    fours: tl.constexpr = beside and DIGITS == 1 and not SYMMETRIC
    several: tl.constexpr = tl.int64 if DIGITS == 1 else tl.int32
    fewer: tl.constexpr = tl.int32 if DIGITS == 1 else tl.int16
    # Places of a block's digits are constants from one register on.
    digits = tl.arange(0, 32 * DIGITS)
    weighs: tl.constexpr = NORM == "here" or NORM == "offset"
    x_ptr += at[None, :] + (start * 128 + digits)[:, None]
    if weighs:
        norm_ptr += start * 128 + digits
        if DIGITS == 1:
            # One for each of x's: loads that some threads have no part in take registers for each address.
            norm_ptr = norm_ptr[:, None] + tl.zeros([1, BM], tl.int32)
    words_ptr += held[:, None] * (BLOCKS * 16) + (start * 16 + word)[None, :]
    # Half of a turn is not for its weights: blocks share it, where registers allow.
    for turn in tl.range(0, stop - start, UNROLL):
        for within in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
            ahead, rows = block_of_turn(turn + within, stop - start, M, EVEN)
            block = start + ahead
            words = tl.load(words_ptr + ahead * 16)
            if beside:
                scales = tl.load(scales_ptr.to(tl.pointer_type(several)) + held * BLOCKS + block)
                if not SYMMETRIC:
                    zeros = tl.load(zeros_ptr.to(tl.pointer_type(fewer)) + held * BLOCKS + block)
            block_x = x_ptr + ahead * 128
            block_norm = norm_ptr + ahead * 128 if weighs else norm_ptr
            for first in tl.static_range(0, 4, DIGITS):  # pyright: ignore[reportGeneralTypeIssues]
                # The groups of what fills the last block do not exist, and x is 0 there.
                group = held * GROUPS + tl.minimum((block * 128 + 32 * first) // GROUP, GROUPS - 1)
                scale_ptr = scales_ptr + group
                scale = scale_of_digits(scales, first, DIGITS, scale_type) if beside else tl.load(scale_ptr)
                if beside and not SYMMETRIC:
                    lifts = lifted((zeros >> (8 * (first // DIGITS % 2))).to(tl.int32), ones)[:, None]
                else:
                    lifts = lifts_of_group(zeros_ptr, group, ones, ZERO, SYMMETRIC)
                k = block * 128 + 32 * first + digits
                norm = block_norm + 32 * first if weighs else block_norm
                x = load_tile(block_x + 32 * first, norm, row, k, rows, offset, K, K % 128 == 0, NORM)
                codes = word_digits(words, ones, lifts, first, DIGITS, first // 2 if fours else 0, BN)
                part = tl.dot(codes.to(x.dtype), x, input_precision="ieee")
                sums = tl.fma(part, scale.to(tl.float32)[:, None], sums)
    return sums


@triton.jit
def linear_words(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, norm_ptr, row_scales_ptr, residual_ptr,
    partial_ptr, arrived_ptr, experts_ptr, pairs_ptr, M, eps, offset, x_stride: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DIGITS: tl.constexpr,
    ZERO: tl.constexpr, SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ADDS: tl.constexpr, SPLITS: tl.constexpr,
    APART: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr = NOT_EARLY,
):  # fmt: skip
    """`llmc.quantized_linear` over codes of at most 4 bits in words `[N, 16 * BLOCKS]`.

    The sum over the exact codes of a group, or of a block where groups are larger, is multiplied once by its
    scale `[N, GROUPS]`. `DIGITS` of a block share a group of `GROUP`. Symmetric codes are stored `ZERO`
    higher; otherwise zero points are uint8 `[N, GROUPS]`. Grid and the rest as `linear`.
    """
    follow(PDL)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    held = weight_rows(N, BN, GATE)
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
    scale = scales_of_rows(x_ptr, row_scales_ptr, row, M, eps, x_stride, K, BM, NORM)
    each: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    even: tl.constexpr = UNROLL == 1 or (each * SPLITS == BLOCKS and each % UNROLL == 0)
    given = (x_ptr, norm_ptr, words_ptr, scales_ptr, zeros_ptr, row, at, held)
    sums = tl.zeros([BN, BM], tl.float32)
    own = tl.program_id(2) * each
    for part in tl.range(0, 1 if APART else SPLITS):
        start = own + part * each
        place = (start, tl.minimum(start + each, stop), M, offset)
        sums += word_part(
            *given, *place, K, BLOCKS, GROUPS, GROUP, DIGITS, ZERO, SYMMETRIC, BM, BN, NORM, UNROLL, even
        )
    if APART:
        sums, M = sum_parts(partial_ptr, arrived_ptr, sums, row, M, SPLITS, BN, BM)
    if NORM != "":
        sums = sums * scale[None, :]
    store_rows(y_ptr, bias_ptr, residual_ptr, sums, row, held, M, N, BN, BM, HAS_BIAS, False, GATE, ADDS)
