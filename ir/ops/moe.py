"""Mixture-of-experts feed-forward over stacked expert weights; the router stays outside."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .linear import tiled_linear


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """`(up + 1) * gate * sigmoid(alpha * gate)` with gate <= limit and |up| <= limit (gpt-oss)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _expert(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    hidden = tiled_linear(x, gate_up)
    if bias is not None:
        hidden = hidden + bias
    if activation.startswith("plain:"):
        return ACTIVATIONS[activation.removeprefix("plain:")](hidden)
    if interleaved:
        gate, up = hidden[..., 0::2], hidden[..., 1::2]
    else:
        gate, up = hidden.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        return clamped_swiglu(gate, up, alpha, limit)
    return ACTIVATIONS[activation](gate) * up


@torch.library.custom_op("llmc::moe", mutates_args=())
def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    """Sum over chosen experts of `expert_weights * down(act(gate_up(x)))`.

    `x[T, D]`, `expert_ids[T, k]`, `expert_weights[T, k]`, `gate_up[E, 2F, D]` (rows: gate then up, or
    alternating when `interleaved`), `down[E, D, F]`, biases `[E, 2F]` and `[E, D]`. `activation` is a name
    of `ACTIVATIONS`, `clamped_swiglu`, or `plain:NAME` for experts without a gate (`gate_up[E, F, D]`).
    A token's experts are summed in ascending order of choice, in float32.
    """
    out_f32 = x.new_zeros(x.shape, dtype=torch.float32)
    for choice in range(expert_ids.shape[1]):
        for expert in torch.unique(expert_ids[:, choice]).tolist():
            rows = (expert_ids[:, choice] == expert).nonzero()[:, 0]
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            hidden = _expert(x[rows], gate_up[expert], bias, activation, interleaved, alpha, limit)
            result = tiled_linear(hidden, down[expert])
            if down_bias is not None:
                result = result + down_bias[expert]
            out_f32[rows] += result.float() * expert_weights[rows, choice, None].float()
    return out_f32.to(x.dtype)


@moe.register_fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    return x.new_empty(x.shape)
