"""Mixtures of experts: pairs of a token and a choice are put into tiles of one expert each, on the device, so
that products read each expert once; what a pair gets depends on nothing but its token."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def count_pairs(ids_ptr, counts_ptr, pairs, BLOCK: tl.constexpr):
    """How many of the `pairs` expert ids are this program's. Grid (experts,)."""
    expert = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        found += (tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, 0))


@triton.jit
def place_pairs(
    ids_ptr,
    counts_ptr,
    experts_ptr,
    placed_ptr,
    pairs,
    tiles,
    EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tiles of this program's expert: `experts[tiles]` is it, or -1 where there is no pair, and
    `placed[tiles * TILE]` are the pairs, ascending, then -1. Grid (EXPERTS,)."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERT_BLOCK)
    counts = tl.load(counts_ptr + other, mask=other < EXPERTS, other=0)
    needed = (counts + TILE - 1) // TILE
    first = tl.sum(tl.where(other < expert, needed, 0), 0)
    own = tl.sum(tl.where(other == expert, counts, 0), 0)
    end = first + (own + TILE - 1) // TILE
    last = expert == EXPERTS - 1
    within = tl.arange(0, TILE)
    for tile in tl.range(first, tl.where(last, tiles, end)):
        tl.store(experts_ptr + tile, tl.where(tile < end, expert, -1))
        place = tile * TILE + within
        tl.store(placed_ptr + place, tl.full([TILE], -1, tl.int32), mask=place >= first * TILE + own)
    before = first * TILE
    for start in tl.range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        is_own = (tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        rank = tl.cumsum(is_own, 0) - 1
        tl.store(placed_ptr + before + rank, pair, mask=is_own != 0)
        before += tl.sum(is_own, 0)


@triton.jit
def expert_activation(
    hidden_ptr,
    out_ptr,
    alpha,
    limit,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What lies between the products of an expert: `hidden[pairs, COLUMNS * WIDTH]` to `out[pairs, WIDTH]`,
    as `ir.ops.moe.expert_hidden`. Grid (pairs, ceil(WIDTH / BLOCK))."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = hidden_ptr + pair * (COLUMNS * WIDTH)
    element = out_ptr.dtype.element_ty
    if COLUMNS == 1:
        x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        out = activate(x, ACTIVATION)
    else:
        at = 2 * column if INTERLEAVED else column
        beside = at + 1 if INTERLEAVED else at + WIDTH
        gate = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(row + beside, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "clamped_swiglu":
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            out = (up + 1.0) * (gate / (1.0 + tl.exp(-gate * alpha)))
        else:
            out = activate(gate, ACTIVATION).to(element).to(tl.float32) * up
    tl.store(out_ptr + pair * WIDTH + column, out.to(element), mask=inside)


@triton.jit
def combine(
    results_ptr,
    weights_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over a token's choices, ascending, of weight and result, in float32.

    Grid (tokens, ceil(WIDTH / BLOCK)).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):  # pyright: ignore[reportGeneralTypeIssues]
        pair = token * CHOICES + choice
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        result = tl.load(results_ptr + pair * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        total += result * weight
    tl.store(out_ptr + token * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=inside)
