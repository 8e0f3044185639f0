"""The attention recurrence that every form of attention shares, in plain torch.

Keys are taken in blocks at absolute multiples of `KEY_BLOCK` and merged in ascending order by one
rescaling rule (Milakov & Gimelshein 2018), queries in padded tiles of `QUERY_TILE` rows, so that a row's
bits depend on its own sequence alone: not on the chunk, the batch, or where pages lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KEY_BLOCK = 64
QUERY_TILE = 32


def sequence_ids(positions: Tensor) -> Tensor:
    """Which packed sequence each token belongs to: a new one starts at every position 0."""
    return (positions == 0).cumsum(0) - 1


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    first_key: int,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    """Attention of one sequence: `q[T, H, D]` at `positions[T]` over keys from position `first_key` on.

    `k[M, G, D]`, `v[M, G, V]`; gives `[T, H, V]` in q's dtype. Scores, softmax and sums are float32.
    """
    pad = first_key % KEY_BLOCK
    base = first_key - pad
    tail = -(k.shape[0] + pad) % KEY_BLOCK
    k_GMD = F.pad(k.float(), (0, 0, 0, 0, pad, tail)).transpose(0, 1).contiguous()
    v_GMV = F.pad(v.float(), (0, 0, 0, 0, pad, tail)).transpose(0, 1).contiguous()
    last_key = first_key + k.shape[0] - 1
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    for start in range(0, q.shape[0], QUERY_TILE):
        tile = slice(start, min(start + QUERY_TILE, q.shape[0]))
        missing = QUERY_TILE - (tile.stop - tile.start)
        q_tile = F.pad(q[tile].float(), (0, 0, 0, 0, 0, missing)) * scale
        p_tile = F.pad(positions[tile], (0, missing), value=-1)
        result = _attend_tile(
            q_tile, k_GMD, v_GMV, p_tile, (base, first_key, last_key), sinks, window, softcap, chunk
        )
        out[tile] = result[: tile.stop - tile.start].to(q.dtype)
    return out


def _attend_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    span: tuple[int, int, int],
    sinks: Tensor | None,
    window: int,
    softcap: float,
    chunk: int,
) -> Tensor:
    base, first_key, last_key = span
    num_rows, num_heads, width = q.shape
    groups = k.shape[0]
    q_G = q.reshape(num_rows, groups, num_heads // groups, width).permute(1, 2, 0, 3)
    q_G = q_G.reshape(groups, -1, width).contiguous()
    top = q.new_full((groups, q_G.shape[1], 1), -torch.inf)
    total, acc = torch.zeros_like(top), q.new_zeros((groups, q_G.shape[1], v.shape[2]))
    if sinks is not None:
        top = sinks.float().reshape(groups, -1, 1, 1).expand(-1, -1, num_rows, 1).reshape(top.shape)
        total = torch.ones_like(total)
    for start in range(0, k.shape[1], KEY_BLOCK):
        keys = torch.arange(base + start, base + start + KEY_BLOCK)
        if int(keys[0]) > int(positions.max()):
            break
        scores = q_G @ k[:, start : start + KEY_BLOCK].transpose(1, 2)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        seen = visible(positions, keys, window, chunk) & (keys >= first_key) & (keys <= last_key)
        seen = seen.repeat(num_heads // groups, 1)
        scores = scores.masked_fill(~seen, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = new_top.masked_fill(new_top == -torch.inf, 0.0)
        fade, weight = torch.exp(top - finite), torch.exp(scores - finite)
        total = total * fade + weight.sum(-1, keepdim=True)
        acc = acc * fade + weight @ v[:, start : start + KEY_BLOCK]
        top = new_top
    out = acc / total.masked_fill(total == 0, 1.0)
    return out.reshape(groups, -1, num_rows, v.shape[2]).permute(2, 0, 1, 3).flatten(1, 2)


def visible(positions: Tensor, keys: Tensor, window: int, chunk: int) -> Tensor:
    """Bool `[T, M]`: may the query at `positions[T]` see the key at position `keys[M]`?"""
    query, key = positions[:, None], keys[None, :]
    mask = key <= query
    if window:
        mask = mask & (key > query - window)
    if chunk:
        mask = mask & (key // chunk == query // chunk)
    return mask
