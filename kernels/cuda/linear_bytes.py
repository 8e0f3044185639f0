"""Matrix products over weights of one-byte codes, of rows of values or of codes themselves, as `linear` sums
them."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow
from .rounding import NO_E4M3, byte_values
from .tiles import load_tile, rows_of_tile, scales_of_rows, store_rows, sum_parts, weight_rows
from .words import byte_values_of_words, exponents, scale_of_digits


@triton.jit
def load_codes(
    codes_ptr, start, STORED: tl.constexpr, BK: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr
):
    """Codes `start` … `start + BK` of the rows that `codes_ptr` points to the first codes of; 0 outside.
    Elements are `STEP` codes."""
    if FULL:
        return tl.load(codes_ptr + start // STEP)
    else:
        inside = start // STEP + tl.arange(0, BK // STEP)[None, :] < STORED // STEP
        return tl.load(codes_ptr + start // STEP, mask=inside, other=0.0)


@triton.jit
def byte_product(
    codes,
    x,
    part,
    ones,
    BN: tl.constexpr,
    BK: tl.constexpr,
    X_FORM: tl.constexpr,
    FORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """`part` plus the product of codes of the weight and of x, which are values where `X_FORM` is empty."""
    if X_FORM == "int8" and FORM == "int8":
        return tl.dot(codes, x, part, out_dtype=tl.int32)
    elif codes.dtype == tl.float8e4nv:
        # Tensor cores keep some 14 bits of such sums: no more than a step's are left to them.
        return tl.dot(codes, x, part, max_num_imprecise_acc=BK)
    else:
        if PACKED:
            left = byte_values_of_words(codes, ones, FORM, BN, BK // 4)
        else:
            left = byte_values(codes, FORM).to(tl.bfloat16)
        right = x if X_FORM == "" else byte_values(x, X_FORM).to(tl.bfloat16)
        return tl.dot(left.to(right.dtype), right, part, input_precision="ieee")


@triton.jit
def code_part(
    x_ptr, norm_ptr, codes_ptr, row, at, held, first, length, M, offset, K: tl.constexpr,
    STORED: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    X_FORM: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The sum over `length` codes from `first` on, without scales."""
    depth = tl.arange(0, BK)
    integers: tl.constexpr = X_FORM == "int8" and FORM == "int8"
    part = tl.zeros([BN, BM], tl.int32 if integers else tl.float32)
    weighs: tl.constexpr = NORM == "here" or NORM == "offset"
    ones = exponents(M)
    step: tl.constexpr = 4 if PACKED else 1  # pyright: ignore[reportAssignmentType]
    codes_ptr += held[:, None] * (STORED // step) + tl.arange(0, BK // step)[None, :]
    x_ptr += at[None, :] + depth[:, None]
    if weighs:
        norm_ptr = norm_ptr + depth[:, None] + tl.zeros([1, BM], tl.int32)
    for within in tl.range(0, length, BK):
        start = first + within
        codes = load_codes(codes_ptr, start, STORED, BK, FULL, step)
        norm = norm_ptr + start if weighs else norm_ptr
        x = load_tile(x_ptr + start, norm, row, start + depth, M, offset, K, FULL, NORM)
        part = byte_product(codes, x, part, ones, BN, BK, X_FORM, FORM, PACKED)
    return part


@triton.jit
def group_part(
    x_ptr, norm_ptr, codes_ptr, scales_ptr, row, at, held, first, last, M, offset, K: tl.constexpr,
    STORED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, X_FORM: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr,
    NORM: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """The sum over groups `first` … `last`, `PER` of them a turn; each group's is multiplied by its scale
    once, fused with the addition to the groups before."""
    scale_type: tl.constexpr = scales_ptr.dtype.element_ty
    sums = tl.zeros([BN, BM], tl.float32)
    for turn in tl.range(first, last, PER):
        if PER == 4:
            scales = tl.load(scales_ptr.to(tl.pointer_type(tl.int64)) + held * (GROUPS // 4) + turn // 4)
        for index in tl.static_range(PER):  # pyright: ignore[reportGeneralTypeIssues]
            start = (turn + index) * GROUP
            place = (row, at, held, start, GROUP, M, offset)
            part = code_part(
                x_ptr, norm_ptr, codes_ptr, *place, K, STORED, FULL, BM, BN, BK, X_FORM, FORM, PACKED, NORM
            )
            if PER == 4:
                scale = scale_of_digits(scales, index, 1, scale_type)
            else:
                scale = tl.load(scales_ptr + held * GROUPS + turn + index)
            sums = tl.fma(part.to(tl.float32), scale.to(tl.float32)[:, None], sums)
    return sums


@triton.jit
def scaled_part(
    x_ptr, norm_ptr, codes_ptr, scales_ptr, row, at, held, first, last, M, offset, K: tl.constexpr,
    STORED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, X_FORM: tl.constexpr, FORM: tl.constexpr, PACKED: tl.constexpr,
    NORM: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """The sum over codes `first` … `last` of rows with one scale, over such groups of others."""
    if GROUPS == 1:
        place = (row, at, held, first, last - first, M, offset)
        part = code_part(
            x_ptr, norm_ptr, codes_ptr, *place, K, STORED, FULL, BM, BN, BK, X_FORM, FORM, PACKED, NORM
        )
        return part.to(tl.float32) * tl.load(scales_ptr + held).to(tl.float32)[:, None]
    else:
        given = (x_ptr, norm_ptr, codes_ptr, scales_ptr, row, at, held, first, last, M, offset)
        return group_part(*given, K, STORED, GROUPS, GROUP, FULL, BM, BN, BK, X_FORM, FORM, PACKED, NORM, PER)


@triton.jit
def linear_bytes(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, y_ptr, norm_ptr, row_scales_ptr, residual_ptr, partial_ptr,
    arrived_ptr, experts_ptr, pairs_ptr, M, eps, offset, x_stride: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, STORED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, X_FORM: tl.constexpr,
    FORM: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHARED: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    ADDS: tl.constexpr, SPLITS: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr = NOT_EARLY,
    E4M3: tl.constexpr = NO_E4M3,
):  # fmt: skip
    """`llmc.quantized_linear` over symmetric one-byte codes `[N, STORED]`, scales `[N, GROUPS]`.

    `FORM` is `int8` or `fp8` (e4m3, given as bytes); `PACKED` are given as words of four. `X_FORM` is empty
    where x has values; otherwise x has codes of it, and float32 scales of rows: int8 by int8 is summed in
    integers, exactly; others as bfloat16, which holds every code, but e4m3 by e4m3 as itself where the
    architecture multiplies it (`E4M3`). Grid and the rest as `linear`.
    """
    follow(PDL)
    both_fp8: tl.constexpr = E4M3 and X_FORM == "fp8" and FORM == "fp8"
    packed: tl.constexpr = PACKED and not both_fp8
    if both_fp8:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    taken = rows_of_tile(experts_ptr, pairs_ptr, M, x_stride, BM, SHARED)
    row, at, expert = taken  # pyright: ignore[reportGeneralTypeIssues]
    held = weight_rows(N, BN, GATE)
    whole: tl.constexpr = GROUP if GROUPS == 1 else GROUPS
    stop = whole
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, whole)
        first_row = tl.maximum(expert, 0).to(tl.int64) * N
        codes_ptr += first_row * (STORED // 4 if packed else STORED)
        scales_ptr += first_row * GROUPS
        if HAS_BIAS:
            bias_ptr += first_row
    scale = scales_of_rows(x_ptr, row_scales_ptr, row, M, eps, x_stride, K, BM, NORM)
    # A row with one scale is cut within it, others between their groups; scales that lie side by side are one
    # load, and groups share what a turn costs.
    halves: tl.constexpr = scales_ptr.dtype.element_ty.primitive_bitwidth == 16
    beside: tl.constexpr = GROUPS % 4 == 0 and GROUP <= 64 and halves
    # Sums of four groups for 128 rows are more than tensor memory of sm_100 holds.
    turn: tl.constexpr = 4 if beside and BM <= 64 else 1  # pyright: ignore[reportAssignmentType]
    step: tl.constexpr = BK if GROUPS == 1 else 4 if beside else 1  # pyright: ignore[reportAssignmentType]
    each: tl.constexpr = (whole + step * SPLITS - 1) // (step * SPLITS) * step
    full: tl.constexpr = GROUP % BK == 0 and GROUPS * GROUP <= STORED and GROUPS * GROUP <= K
    sums = tl.zeros([BN, BM], tl.float32)
    own = tl.program_id(2) * each
    for part in tl.range(0, 1 if APART else SPLITS):
        first = own + part * each
        last = tl.minimum(first + each, stop)
        given = (x_ptr, norm_ptr, codes_ptr, scales_ptr, row, at, held, first, last, M, offset)
        sums += scaled_part(
            *given, K, STORED, GROUPS, GROUP, full, BM, BN, BK, X_FORM, FORM, packed, NORM, turn
        )
    if APART:
        sums, M = sum_parts(partial_ptr, arrived_ptr, sums, row, M, SPLITS, BN, BM)
    if NORM != "":
        sums = sums * scale[None, :]
    wide: tl.constexpr = X_FORM != ""
    store_rows(y_ptr, bias_ptr, residual_ptr, sums, row, held, M, N, BN, BM, HAS_BIAS, wide, GATE, ADDS)
