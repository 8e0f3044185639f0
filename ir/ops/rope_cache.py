"""Rotation and cache write of one attention in one operator; shape letters as in `ops.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import operator


@operator("llmc::rope_kv_write", mutates_args=("k_cache", "v_cache", "k_scales", "v_scales"))
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    style: str,
    tail: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of `q[T, H, D]` and of `k[T, G, D]`, then `kv_write` of the rotated k and of `v[T, G, V]`.

    Gives the rotated q and the token that `kv_write` gives; the rotated k is in the cache alone.
    """
    rotated_q = torch.ops.llmc.rope(q, positions, inv_freq, scale, style, tail)
    rotated_k = torch.ops.llmc.rope(k, positions, inv_freq, scale, style, tail)
    written = torch.ops.llmc.kv_write(rotated_k, v, k_cache, v_cache, slots, k_scales, v_scales)
    return rotated_q, written


@rope_kv_write.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: float,
    style: str,
    tail: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(0)
