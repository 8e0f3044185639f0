"""Normalisation operators. Statistics are always computed in float32, over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .registration import operator


def _scaled(n_f32: Tensor, weight: Tensor | None, offset: float, style: str, dtype: torch.dtype) -> Tensor:
    if weight is None:
        return n_f32.to(dtype)
    if style == "cast_then_scale":
        scale = weight + offset if offset else weight
        return scale * n_f32.to(dtype)
    return (n_f32 * (weight.float() + offset)).to(dtype)


@operator("llmc::rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, style: str) -> Tensor:
    """Root-mean-square norm of `x[..., D]` (Zhang & Sennrich 2019): n = x / sqrt(mean(x^2) + eps).

    `style` says where the result returns to x's dtype: `cast_then_scale` gives
    `(weight + offset) * cast(n)`, `scale_then_cast` gives `cast(n * (float32(weight) + offset))`.
    Without a weight the result is `cast(n)`.
    """
    x_f32 = x.float()
    n_f32 = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
    return _scaled(n_f32, weight, offset, style, x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, style: str) -> Tensor:
    return _norm_like(x, weight, style)


@operator("llmc::layer_norm")
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, style: str
) -> Tensor:
    """Layer norm of `x[..., D]` (Ba et al. 2016): n = (x - mean) / sqrt(var + eps), styles as `rms_norm`.

    A bias is added in float32 before the cast in style `scale_then_cast`, in x's dtype otherwise.
    """
    x_f32 = x.float()
    centred = x_f32 - x_f32.mean(-1, keepdim=True)
    n_f32 = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if style == "scale_then_cast":
        out = n_f32 if weight is None else n_f32 * (weight.float() + offset)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    out = _scaled(n_f32, weight, offset, style, x.dtype)
    return out if bias is None else out + bias


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, style: str) -> Tensor:
    return _norm_like(x, weight, style)


@operator("llmc::add_rms_norm")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, style: str
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` in x's dtype, then `(rms_norm(s), s)`."""
    total = x + residual
    return torch.ops.llmc.rms_norm(total, weight, eps, offset, style), total


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, style: str
) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return _norm_like(total, weight, style), total


@operator("llmc::add_layer_norm")
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    style: str,
) -> tuple[Tensor, Tensor]:
    """`s = x + residual` in x's dtype, then `(layer_norm(s), s)`."""
    total = x + residual
    return torch.ops.llmc.layer_norm(total, weight, bias, eps, offset, style), total


@add_layer_norm.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    style: str,
) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return _norm_like(total, weight, style), total


def _norm_like(x: Tensor, weight: Tensor | None, style: str) -> Tensor:
    promotes = style == "cast_then_scale" and weight is not None
    dtype = torch.promote_types(x.dtype, weight.dtype) if promotes and weight is not None else x.dtype
    return x.new_empty(x.shape, dtype=dtype)
