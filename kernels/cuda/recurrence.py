"""The recurrence of attention that every kernel shares: states over keys, and their merge. Rows are query
heads of one KV head; exponentials are of base 2."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .activation import tanh
from .rounding import byte_values


@triton.jit
def visible(key, position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Bool `[R, BN]`: may the query at `position[R]` see `key[BN]`?"""
    seen = key[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (key[None, :] > position[:, None] - WINDOW)
    if CHUNK > 0:
        seen = seen & (key[None, :] // CHUNK == position[:, None] // CHUNK)
    return seen


@triton.jit
def load_values(address, mask, CODES: tl.constexpr):
    """Cached values, or `CODES` (int8, fp8) without their scale, which every dtype of queries holds
    exactly."""
    if CODES == "":
        return tl.load(address, mask=mask, other=0.0)
    else:
        return byte_values(tl.load(address, mask=mask, other=0), CODES)


@triton.jit
def scores_of(q, k, scales_ptr, slot, held, scale, cap, CAPPED: tl.constexpr, CODES: tl.constexpr):
    """Logits of base 2 `[R, BN]` of queries and keys; `CODES` of keys have their scales at
    `scales_ptr[BN]`."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if CODES != "":
        scores = scores * tl.load(scales_ptr + slot, mask=held, other=0.0)[None, :]
    if CAPPED:
        scores = tanh(scores / cap) * cap * 1.4426950408889634
    return scores


@triton.jit
def attend_split(
    q,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    head,
    position,
    first_key,
    end_key,
    scale,
    cap,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    D_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    CODES: tl.constexpr,
):
    """State (top, total, acc) of query rows `q[R, D_BLOCK]` at `position[R]` over keys `first_key` … `end_key
    - 1`.

    `first_key` is a multiple of `BN`. A block that a row cannot see changes no bit of the row's state, so it
    does not matter which rows share a tile. Exponentials are of base 2: `scale` includes log2(e), unless
    scores are `CAPPED`.
    """
    rows: tl.constexpr = q.shape[0]
    d = tl.arange(0, D_BLOCK)
    e = tl.arange(0, V_BLOCK)
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, V_BLOCK], tl.float32)
    for start in tl.range(first_key, end_key, BN):
        key = start + tl.arange(0, BN)
        page = tl.load(table_ptr + key // PAGE, mask=key < end_key, other=-1)
        held = page >= 0
        slot = (tl.where(held, page, 0) * PAGE + key % PAGE) * KV_HEADS + head
        k_mask = held[None, :] & (d[:, None] < D)
        k = load_values(k_cache_ptr + slot[None, :] * D + d[:, None], k_mask, CODES).to(q.dtype)
        scores = scores_of(q, k, k_scales_ptr, slot, held, scale, cap, CAPPED, CODES)
        seen = held[None, :] & visible(key, position, WINDOW, CHUNK)
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        weight = tl.exp2(scores - base[:, None])
        total = total * fade + tl.sum(weight, 1)
        v_mask = held[:, None] & (e[None, :] < V)
        v = load_values(v_cache_ptr + slot[:, None] * V + e[None, :], v_mask, CODES).to(q.dtype)
        if CODES != "":  # what nobody sees may be anything, also NaN
            weight = tl.where(seen, weight * tl.load(v_scales_ptr + slot, mask=held, other=0.0)[None, :], 0.0)
        acc = tl.dot(weight.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def merge_states(top, total, acc, top_b, total_b, acc_b):
    """The state over the keys of two states, the earlier keys first."""
    new_top = tl.maximum(top, top_b)
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    fade = tl.exp2(top - base)
    fade_b = tl.exp2(top_b - base)
    return new_top, total * fade + total_b * fade_b, acc * fade[:, None] + acc_b * fade_b[:, None]


@triton.jit
def initial_state(sinks_ptr, heads, exists, HAS_SINKS: tl.constexpr, R: tl.constexpr, V_BLOCK: tl.constexpr):
    """The state over no keys: empty, or a sink's logit that carries no value."""
    top = tl.full([R], -float("inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=exists, other=0.0).to(tl.float32)
        top = sink * 1.4426950408889634
        total = tl.full([R], 1.0, tl.float32)
    return top, total, tl.zeros([R, V_BLOCK], tl.float32)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The oldest key that a query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def keys_of_split(split, oldest, newest, SPLIT: tl.constexpr, BN: tl.constexpr):
    """First key, a multiple of `BN`, and end of what queries that see `oldest` … `newest` need of a split."""
    first_key = tl.maximum(split * SPLIT, oldest // BN * BN)
    return first_key, tl.minimum(split * SPLIT + SPLIT, newest + 1)


@triton.jit
def load_queries(q_ptr, token, heads, exists, q_stride: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """`q[R, D_BLOCK]` of heads `heads[R]` of `token`, zero beyond D."""
    d = tl.arange(0, D_BLOCK)
    address = token * q_stride + heads[:, None] * D + d[None, :]
    return tl.load(q_ptr + address, mask=exists[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_result(
    out_ptr, total, acc, token, heads, exists, HEADS: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr
):
    """The attention of a finished state to dense `out[T, HEADS, V]`; 0 where nothing was seen."""
    e = tl.arange(0, V_BLOCK)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + (token * HEADS + heads[:, None]) * V + e[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (e[None, :] < V))
