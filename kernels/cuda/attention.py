"""Attention over the paged cache. One recurrence for prefill, decode and verification: keys in blocks of `BN`
at absolute multiples of it, states of splits of fixed absolute length, merged in ascending order."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow
from .recurrence import (
    attend_split,
    first_visible,
    initial_state,
    keys_of_split,
    load_queries,
    merge_states,
    store_result,
)


@triton.jit
def tile_of_sequence(starts_ptr, num_sequences, tile, TOKENS: tl.constexpr, SEARCH: tl.constexpr):
    """Sequence, first token and end of the sequence's tokens of tile `tile`, where sequence s has its first
    tile at `starts[s] // TOKENS + s`; found by `SEARCH` bisections."""
    low = tile * 0
    high = num_sequences
    for _ in tl.static_range(SEARCH):  # pyright: ignore[reportGeneralTypeIssues]
        middle = (low + high) // 2
        first_tile = tl.load(starts_ptr + tl.minimum(middle, num_sequences)) // TOKENS + middle
        goes_on = (first_tile <= tile) & (low < high)
        high = tl.where(goes_on | (low >= high), high, middle)
        low = tl.where(goes_on, middle + 1, low)
    sequence = low - 1
    start = tl.load(starts_ptr + sequence)
    return sequence, start + (tile - start // TOKENS - sequence) * TOKENS, tl.load(starts_ptr + sequence + 1)


@triton.jit
def paged_attention(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    starts_ptr,
    positions_ptr,
    sinks_ptr,
    out_ptr,
    num_sequences,
    table_stride,
    scale,
    cap,
    q_stride: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    D_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    CODES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """`llmc.paged_attention` of any mixture of sequences. Grid (ceil(T / TOKENS) + sequences, KV_HEADS): a
    program takes `TOKENS` tokens of one sequence with all query heads of one KV head, `SHARED_BLOCK` rows a
    token."""
    head = tl.program_id(1)
    found = tile_of_sequence(starts_ptr, num_sequences, tl.program_id(0), TOKENS, SEARCH)
    sequence, first_token, stop = found  # pyright: ignore[reportGeneralTypeIssues]
    if first_token < stop:
        shared: tl.constexpr = HEADS // KV_HEADS
        row = tl.arange(0, TOKENS * SHARED_BLOCK)
        token = first_token + row // SHARED_BLOCK
        heads = head * shared + row % SHARED_BLOCK
        exists = (token < stop) & (row % SHARED_BLOCK < shared)
        q = load_queries(q_ptr, token[:, None], heads, exists, q_stride, D, D_BLOCK)
        position = tl.load(positions_ptr + token, mask=exists, other=-1)
        oldest = first_visible(tl.load(positions_ptr + first_token), WINDOW, CHUNK)
        newest = tl.max(position, 0)
        top, total, acc = initial_state(sinks_ptr, heads, exists, HAS_SINKS, TOKENS * SHARED_BLOCK, V_BLOCK)
        for split in tl.range(oldest // SPLIT, newest // SPLIT + 1):
            first_key, end_key = keys_of_split(split, oldest, newest, SPLIT, BN)
            top_b, total_b, acc_b = attend_split(
                *(q, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr),
                *(table_ptr + sequence * table_stride, head, position, first_key, end_key, scale, cap),
                *(KV_HEADS, D, V, D_BLOCK, V_BLOCK, PAGE, BN, WINDOW, CHUNK, CAPPED, CODES),
            )
            top, total, acc = merge_states(top, total, acc, top_b, total_b, acc_b)
        store_result(out_ptr, total, acc, token[:, None], heads, exists, HEADS, V, V_BLOCK)


@triton.jit
def decode_splits(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    positions_ptr,
    state_ptr,
    acc_ptr,
    table_stride,
    scale,
    cap,
    q_stride: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    D_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    CODES: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """States of all splits of a step that has one token a sequence. Grid (tokens, KV_HEADS, splits).

    Writes float32 `state[T, HEADS, splits, 2]` and `acc[T, HEADS, splits, V]`; a split without a visible key
    has top -inf, total 0. `merge_splits` finishes.
    """
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    shared: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, SHARED_BLOCK)
    heads = head * shared + row
    exists = row < shared
    q = load_queries(q_ptr, token, heads, exists, q_stride, D, D_BLOCK)
    newest = tl.load(positions_ptr + token)
    position = tl.where(exists, newest, -1)
    oldest = first_visible(newest, WINDOW, CHUNK)
    first_key, end_key = keys_of_split(split, oldest, newest, SPLIT, BN)
    table = table_ptr + token * table_stride
    top, total, acc = attend_split(
        *(q, k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, table, head, position),
        *(first_key, end_key, scale, cap),
        *(KV_HEADS, D, V, D_BLOCK, V_BLOCK, PAGE, BN, WINDOW, CHUNK, CAPPED, CODES),
    )
    e = tl.arange(0, V_BLOCK)
    place = (token * HEADS + heads) * tl.num_programs(2) + split
    tl.store(state_ptr + place * 2, top, mask=exists)
    tl.store(state_ptr + place * 2 + 1, total, mask=exists)
    tl.store(acc_ptr + place[:, None] * V + e[None, :], acc, mask=exists[:, None] & (e[None, :] < V))


@triton.jit
def merge_splits(
    state_ptr,
    acc_ptr,
    positions_ptr,
    sinks_ptr,
    out_ptr,
    splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    V: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """Attention from the states of `decode_splits`, merged as `paged_attention` merges. Grid (tokens,
    KV_HEADS)."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    shared: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, SHARED_BLOCK)
    heads = head * shared + row
    exists = row < shared
    e = tl.arange(0, V_BLOCK)
    newest = tl.load(positions_ptr + token)
    oldest = first_visible(newest, WINDOW, CHUNK)
    top, total, acc = initial_state(sinks_ptr, heads, exists, HAS_SINKS, SHARED_BLOCK, V_BLOCK)
    for split in tl.range(oldest // SPLIT, newest // SPLIT + 1):
        place = (token * HEADS + heads) * splits + split
        top_b = tl.load(state_ptr + place * 2, mask=exists, other=-float("inf"))
        total_b = tl.load(state_ptr + place * 2 + 1, mask=exists, other=0.0)
        acc_mask = exists[:, None] & (e[None, :] < V)
        acc_b = tl.load(acc_ptr + place[:, None] * V + e[None, :], mask=acc_mask, other=0.0)
        top, total, acc = merge_states(top, total, acc, top_b, total_b, acc_b)
    store_result(out_ptr, total, acc, token, heads, exists, HEADS, V, V_BLOCK)
