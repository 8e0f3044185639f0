"""Matrix products over weights of one-byte codes, of rows of values or of codes themselves, as `linear` sums
them."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow
from .rounding import NO_E4M3, byte_values
from .tiles import load_rows, rows_of_tile, scales_of_rows, store_rows, sum_parts, weight_rows
from .words import byte_values_of_words


@triton.jit
def load_codes(
    codes_ptr, held, start, STORED: tl.constexpr, BK: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr
):
    """Codes `start` … `start + BK` of rows, as bytes or, `PACKED`, as words of four; 0 outside."""
    step: tl.constexpr = 4 if PACKED else 1  # pyright: ignore[reportAssignmentType]
    k = start // step + tl.arange(0, BK // step)
    address = held[:, None] * (STORED // step) + k[None, :]
    if FULL:
        return tl.load(codes_ptr + address)
    else:
        return tl.load(codes_ptr + address, mask=k[None, :] < STORED // step, other=0.0)


@triton.jit
def byte_product(
    codes,
    x,
    part,
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
            left = byte_values_of_words(codes, FORM, BN, BK // 4)
        else:
            left = byte_values(codes, FORM).to(tl.bfloat16)
        right = x if X_FORM == "" else byte_values(x, X_FORM).to(tl.bfloat16)
        return tl.dot(left.to(right.dtype), right, part, input_precision="ieee")


@triton.jit
def byte_part(
    x_ptr,
    norm_ptr,
    codes_ptr,
    scales_ptr,
    row,
    at,
    held,
    first,
    last,
    stop,
    M,
    offset,
    K: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    X_FORM: tl.constexpr,
    FORM: tl.constexpr,
    PACKED: tl.constexpr,
    NORM: tl.constexpr,
):
    """The sum over groups, or where a row is one group over codes, `first` … `last`; a group's is multiplied
    by its scale once. With `stop` 0 it is over nothing."""
    depth = tl.arange(0, BK)
    sums = tl.zeros([BN, BM], tl.float32)
    integers: tl.constexpr = X_FORM == "int8" and FORM == "int8"
    full: tl.constexpr = GROUP % BK == 0 and GROUPS * GROUP <= STORED and GROUPS * GROUP <= K
    inner: tl.constexpr = GROUPS == 1
    for group in tl.range(0 if inner else first, stop if inner else tl.minimum(last, stop)):
        part = tl.zeros([BN, BM], tl.int32 if integers else tl.float32)
        for at_code in tl.range(first if inner else 0, last if inner else GROUP, BK):
            start = group * GROUP + at_code
            codes = load_codes(codes_ptr, held, start, STORED, BK, full, PACKED)
            x = load_rows(x_ptr, norm_ptr, row, at, start + depth, M, offset, K, full, NORM)
            part = byte_product(codes, x, part, BN, BK, X_FORM, FORM, PACKED)
        scale = tl.load(scales_ptr + held * GROUPS + group).to(tl.float32)
        sums += part.to(tl.float32) * scale[:, None]
    return sums


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
    stop = GROUPS
    if SHARED > 0:
        stop = tl.where(expert < 0, 0, GROUPS)
        first_row = tl.maximum(expert, 0).to(tl.int64) * N
        codes_ptr += first_row * (STORED // 4 if packed else STORED)
        scales_ptr += first_row * GROUPS
        if HAS_BIAS:
            bias_ptr += first_row
    scale = scales_of_rows(x_ptr, row_scales_ptr, row, M, eps, x_stride, K, BM, NORM)
    given = (x_ptr, norm_ptr, codes_ptr, scales_ptr, row, at, held)
    # A row with one scale is cut within it, others between their groups.
    whole: tl.constexpr = GROUP if GROUPS == 1 else GROUPS
    step: tl.constexpr = BK if GROUPS == 1 else 1
    each: tl.constexpr = (whole + step * SPLITS - 1) // (step * SPLITS) * step
    sums = tl.zeros([BN, BM], tl.float32)
    own = tl.program_id(2) * each
    for part in tl.range(0, 1 if APART else SPLITS):
        first = own + part * each
        place = (first, tl.minimum(first + each, whole), stop, M, offset)
        sums += byte_part(*given, *place, K, STORED, GROUPS, GROUP, BM, BN, BK, X_FORM, FORM, packed, NORM)
    if APART:
        sums, M = sum_parts(partial_ptr, arrived_ptr, sums, row, M, SPLITS, BN, BM)
    if NORM != "":
        sums = sums * scale[None, :]
    wide: tl.constexpr = X_FORM != ""
    store_rows(y_ptr, bias_ptr, residual_ptr, sums, row, held, M, N, BN, BM, HAS_BIAS, wide, GATE, ADDS)
