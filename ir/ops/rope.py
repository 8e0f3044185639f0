"""Rotary position embedding (Su et al. 2021) in the layouts that checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import operator

STYLES = ("half", "interleaved", "interleaved_to_half")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Rotate all of `x[..., R]` by `cos`, `sin` `[..., R/2]`.

    `half` pairs element i with i + R/2; `interleaved` pairs 2i with 2i + 1 and keeps the order;
    `interleaved_to_half` reads adjacent pairs and writes halves.
    """
    if style == "half":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    out = (first * cos - second * sin, second * cos + first * sin)
    if style == "interleaved":
        return torch.stack(out, dim=-1).flatten(-2)
    return torch.cat(out, dim=-1)


@operator("llmc::rope")
def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, scale: float, style: str, tail: bool) -> Tensor:
    """Rotate `R = 2 * len(inv_freq)` of the D elements of each head of `x[T, H, D]`.

    Angles are `positions[T] * inv_freq`, cos and sin multiplied by `scale`, all in float32; the
    result has x's dtype. The rotated elements are the first R, or the last R when `tail`.
    """
    angles = positions.float()[:, None, None] * inv_freq.float()
    cos, sin = angles.cos() * scale, angles.sin() * scale
    width = 2 * inv_freq.shape[0]
    split = x.shape[-1] - width if tail else width
    head, rest = x[..., :split], x[..., split:]
    if tail:
        return torch.cat((head, rotate(rest.float(), cos, sin, style).to(x.dtype)), dim=-1)
    return torch.cat((rotate(head.float(), cos, sin, style).to(x.dtype), rest), dim=-1)


@rope.register_fake
def _(x: Tensor, positions: Tensor, inv_freq: Tensor, scale: float, style: str, tail: bool) -> Tensor:
    return x.new_empty(x.shape)
