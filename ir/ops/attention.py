"""Attention: over packed whole sequences, and over a paged KV cache.

Shape letters: T tokens of the step, S sequences, H query heads, G KV heads, D head width of q and k,
V head width of v, P physical pages, N tokens a page, B pages a sequence may have.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...spec.quant import ActivationScheme
from ..attend import attend_rows, sequence_ids
from ..rounded import code_groups
from .registration import operator


@operator("llmc::attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    layer: int,
    kv_source: int,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    """Causal attention of `q[T, H, D]` over `k[T, G, D]`, `v[T, G, V]`; gives `[T, H, V]`.

    The batch is packed whole sequences: each starts where `positions` is 0 and counts up by one.
    `window`, `chunk`, `softcap` as in `AttentionSpec`; `sinks[H]` is one more logit in each softmax
    that carries no value. `layer` and `kv_source` name caches for later passes and change nothing here.
    """
    sequence = sequence_ids(positions)
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    for index in range(int(sequence[-1]) + 1 if len(sequence) else 0):
        rows = (sequence == index).nonzero()[:, 0]
        out[rows] = attend_rows(
            q[rows], k[rows], v[rows], positions[rows], 0, sinks, scale, window, softcap, chunk
        )
    return out


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    layer: int,
    kv_source: int,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


# How values are rounded to a cache of 8-bit codes: one scale a token and head.
_CODED = {
    torch.int8: ActivationScheme(codes="int8"),
    torch.float8_e4m3fn: ActivationScheme(codes="fp8"),
}


@operator("llmc::kv_write", mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"))
def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Store `k[T, G, D]`, `v[T, G, V]` at `slots[T]` (page * N + offset; negative: skip).

    Caches are `[P, N, G, D]` and `[P, N, G, V]`; values are cast to their dtype. Caches of int8 or e4m3 codes
    have float32 `k_scales`, `v_scales` `[P, N, G]`, which are computed here: each token's head is rounded
    with its largest magnitude on the top code, 127 or 448. Returns an empty tensor that `paged_attention`
    takes, so that the graph carries the order.
    """
    kept = slots >= 0
    places = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    _store(k[kept], k_cache, k_scales, places)
    _store(v[kept], v_cache, v_scales, places)
    return k.new_empty(0)


def _store(values: Tensor, cache: Tensor, scales: Tensor | None, places: tuple[Tensor, Tensor]) -> None:
    assert (scales is not None) == (cache.dtype in _CODED), "caches of codes have scales, others have none"
    if scales is None:
        cache[places] = values.to(cache.dtype)
    else:
        coded = code_groups(values.float(), _CODED[cache.dtype])
        cache[places] = coded.codes.to(cache.dtype)
        scales[places] = coded.scales[..., 0]


@kv_write.register_fake
def _(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return k.new_empty(0)


@operator("llmc::paged_attention")
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    written: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of `q[T, H, D]` over each sequence's cached keys; gives `[T, H, V]`.

    Sequence s owns rows `query_starts[s]` ... `query_starts[s + 1] - 1`, at consecutive `positions`;
    its token at position p lies in page `block_table[s, p // N]`, offset p % N. Entries of pages
    that no query of the step can see may be -1. K and V are read back from the cache, the step's own
    included (`written` is the proof that they are there); codes are multiplied with their scales.
    """
    page_tokens = k_cache.shape[1]
    out = q.new_zeros((q.shape[0], q.shape[1], v_cache.shape[3]))
    bounds = query_starts.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if stop == start:
            continue
        rows = slice(start, stop)
        first, last = int(positions[start]), int(positions[stop - 1])
        oldest = _oldest_visible(first, window, chunk) // page_tokens
        pages = block_table[index, oldest : last // page_tokens + 1].long()
        count = last + 1 - oldest * page_tokens
        out[rows] = attend_rows(
            q[rows],
            _load(k_cache, k_scales, pages, count).to(q.dtype),
            _load(v_cache, v_scales, pages, count).to(q.dtype),
            positions[rows],
            oldest * page_tokens,
            sinks,
            scale,
            window,
            softcap,
            chunk,
        )
    return out


def _load(cache: Tensor, scales: Tensor | None, pages: Tensor, count: int) -> Tensor:
    """The first `count` tokens of `pages`: `[count, G, D]`."""
    values = cache[pages].flatten(0, 1)[:count]
    return values if scales is None else values.float() * scales[pages].flatten(0, 1)[:count, :, None]


def _oldest_visible(position: int, window: int, chunk: int) -> int:
    oldest = max(0, position - window + 1) if window else 0
    return max(oldest, position // chunk * chunk) if chunk else oldest


@paged_attention.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    written: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3]))
