"""What surrounds the inner loop of every product: which rows and columns a program has, the norm of its rows
before it, and behind it the sum of the parts of K, the bias, the gate and the residual addition."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate

# Elements of a row that are summed side by side, at most.
_LANES = tl.constexpr(1024)


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
def weight_rows(N: tl.constexpr, BN: tl.constexpr, GATE: tl.constexpr):
    """The rows of the weight `[N, K]` that this program multiplies, int64. With `GATE` those of a gate and of
    what it gates take turns, N / 2 rows apart. Rows that do not exist are the last one, which costs less than
    a mask, and their sums are not stored."""
    lane = tl.arange(0, BN)
    if GATE == "":
        held = tl.minimum(tl.program_id(0) * BN + lane, N - 1)
    else:
        column = tl.minimum(tl.program_id(0) * (BN // 2) + lane // 2, N // 2 - 1)
        held = column + (lane % 2) * (N // 2)
    return held.to(tl.int64)


@triton.jit
def weighed(x, weight, offset):
    """x times the weight of a norm, in x's dtype."""
    return (x.to(tl.float32) * (weight.to(tl.float32) + offset)).to(x.dtype)


@triton.jit
def load_rows(
    x_ptr, norm_ptr, row, at, k, M, offset, K: tl.constexpr, FULL: tl.constexpr, NORM: tl.constexpr
):
    """`x[k, row]` of rows that start at `at`, as `load_tile`."""
    weighs: tl.constexpr = NORM == "here" or NORM == "offset"
    norm_ptr = norm_ptr + k if weighs else norm_ptr
    return load_tile(x_ptr + (at[None, :] + k[:, None]), norm_ptr, row, k, M, offset, K, FULL, NORM)


@triton.jit
def load_tile(x_ptr, norm_ptr, row, k, M, offset, K: tl.constexpr, FULL: tl.constexpr, NORM: tl.constexpr):
    """What lies at `x_ptr[k, row]`, 0 outside; `FULL` says that every `k` is below K. `NORM` "here"
    multiplies by the norm's weight at `norm_ptr[k]` or `norm_ptr[k, row]`."""
    inside = row[None, :] < M
    if not FULL:
        inside = inside & (k[:, None] < K)
    x = tl.load(x_ptr, mask=inside, other=0.0)
    if NORM == "here" or NORM == "offset":
        if len(norm_ptr.shape) == 2:
            weight = tl.load(norm_ptr, mask=inside, other=0.0)
        elif FULL:
            weight = tl.load(norm_ptr)[:, None]
        else:
            weight = tl.load(norm_ptr, mask=k < K, other=0.0)[:, None]
        # Without an offset in x's own dtype, two at a time: both products are exact and rounded once.
        x = weighed(x, weight, offset) if NORM == "offset" else x * weight
    return x


@triton.jit
def inverse_rms(x_ptr, eps, K: tl.constexpr):
    """`1 / sqrt(mean(x^2) + eps)` of one row of K elements.

    Every addition is written out, so that the bits depend on no layout: those of a kernel that multiplies the
    row are those of one that prepares it.
    """
    lanes: tl.constexpr = triton.next_power_of_2(K) if K < _LANES else _LANES
    lane = tl.arange(0, lanes)
    squares = tl.zeros([lanes], tl.float32)
    for start in tl.range(0, K, lanes):
        x = tl.load(x_ptr + start + lane, mask=start + lane < K, other=0.0).to(tl.float32)
        squares += x * x
    halves = squares
    for level in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        if lanes >> level > 1:
            # A sum of two is the same in either order; as two tensors, each thread would make all of them.
            halves = tl.sum(tl.reshape(halves, [lanes >> (level + 1), 2]), 1)
    mean = tl.sum(halves, 0) / K  # of one element
    return 1.0 / tl.sqrt_rn(mean + eps)


@triton.jit
def scales_of_rows(
    x_ptr,
    row_scales_ptr,
    row,
    M,
    eps,
    x_stride: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    NORM: tl.constexpr,
):
    """What `NORM` multiplies the sums of each row by: computed "here" (or with an "offset"), for the first
    tile's few rows, or "before"."""
    if NORM == "here" or NORM == "offset":
        scale = tl.zeros([BM], tl.float32)
        for index in tl.range(0, M):
            found = inverse_rms(x_ptr + tl.cast(index, tl.int64) * x_stride, eps, K)
            scale = tl.where(row == index, found, scale)
    elif NORM == "before":
        scale = tl.load(row_scales_ptr + row, mask=row < M, other=0.0)
    else:
        scale = tl.full([BM], 1.0, tl.float32)
    return scale


@triton.jit
def sum_parts(
    partial_ptr, arrived_ptr, sums, row, M, SPLITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):
    """The sum of a tile's parts, in their order, and M; in all programs but the last to arrive, 0 for M.

    `partial` is float32 `[tiles, SPLITS, BM, BN]`; `arrived[tiles]` starts as zeros and is left so.
    """
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    first = partial_ptr + tile * (SPLITS * BM * BN)
    place = tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
    inside = row[None, :] < M
    tl.store(first + tl.program_id(2) * (BM * BN) + place, sums, mask=inside)
    # Every thread has stored before one of them says so, to all multiprocessors.
    tl.debug_barrier()
    count = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
    rows = M
    if count == SPLITS - 1:
        tl.debug_barrier()
        total = tl.zeros([BN, BM], tl.float32)
        for part in tl.range(0, SPLITS):
            total += tl.load(first + part * (BM * BN) + place, mask=inside, other=0.0)
        sums = total
        tl.store(arrived_ptr + tile, 0)
    else:
        rows = M * 0
    return sums, rows


@triton.jit
def store_rows(
    y_ptr,
    bias_ptr,
    residual_ptr,
    sums,
    row,
    held,
    M,
    N: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Round `sums[BN, BM]` to y's dtype, add the bias there (`WIDE_BIAS`: before), gate one half of the
    columns by the other, add the residual, and store to dense `y[M, N or N / 2]`: each step rounds as the
    operator that it stands for."""
    element = y_ptr.dtype.element_ty
    if HAS_BIAS:
        bias = tl.load(bias_ptr + held).to(tl.float32)[:, None]
        before = sums if WIDE_BIAS else sums.to(element).to(tl.float32)
        out = (before + bias).to(element)
    else:
        out = sums.to(element)
    if GATE == "":
        width: tl.constexpr = N
        column = tl.program_id(0) * BN + tl.arange(0, BN)
    else:
        width: tl.constexpr = N // 2
        column = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        turns = tl.permute(tl.reshape(out, [BN // 2, 2, BM]), [0, 2, 1])
        gate, up = tl.split(turns)
        active = activate(gate.to(tl.float32), GATE).to(element)
        out = (active.to(tl.float32) * up.to(tl.float32)).to(element)
    inside = (row[None, :] < M) & (column[:, None] < width)
    place = row[None, :].to(tl.int64) * width + column[:, None]
    if ADDS:
        residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
        out = (out.to(tl.float32) + residual.to(tl.float32)).to(element)
    tl.store(y_ptr + place, out, mask=inside)
