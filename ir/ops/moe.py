"""Mixture-of-experts feed-forward over stacked expert weights; the router stays outside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...spec.quant import parse_scheme
from ..quantized import dequantize_rows
from ..rounded import rounded_input
from .activation import ACTIVATIONS
from .linear import tiled_linear
from .registration import operator


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """`(up + 1) * gate * sigmoid(alpha * gate)` with gate <= limit and |up| <= limit (gpt-oss)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def expert_hidden(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    activation_scheme: str,
) -> Tensor:
    """What one expert's `gate_up` gives for rows `x`, activation applied: the input of its `down`."""
    hidden = tiled_linear(rounded_input(x, activation_scheme), gate_up)
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


# (gate_up, down) of one expert by its number.
_Experts = Callable[[int], tuple[Tensor, Tensor]]


def _mixture(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: _Experts,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    settings: tuple[str, bool, float, float],
    activation_scheme: str = "",
) -> Tensor:
    out_f32 = x.new_zeros(x.shape, dtype=torch.float32)
    for choice in range(expert_ids.shape[1]):
        for expert in torch.unique(expert_ids[:, choice]).tolist():
            rows = (expert_ids[:, choice] == expert).nonzero()[:, 0]
            gate_up, down = experts(expert)
            bias = None if gate_up_bias is None else gate_up_bias[expert]
            hidden = expert_hidden(x[rows], gate_up, bias, *settings, activation_scheme)
            result = tiled_linear(rounded_input(hidden, activation_scheme), down)
            if down_bias is not None:
                result = result + down_bias[expert]
            out_f32[rows] += result.float() * expert_weights[rows, choice, None].float()
    return out_f32.to(x.dtype)


def _plain_experts(gate_up: Tensor, down: Tensor) -> _Experts:
    return lambda expert: (gate_up[expert], down[expert])


@operator("llmc::moe")
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
    settings = (activation, interleaved, alpha, limit)
    experts = _plain_experts(gate_up, down)
    return _mixture(x, expert_ids, expert_weights, experts, gate_up_bias, down_bias, settings)


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


@operator("llmc::quantized_moe")
def quantized_moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_scheme: str,
    down_scheme: str,
    activation_scheme: str = "",
) -> Tensor:
    """`moe` with the experts given as codes: `gate_up[E, 2F, D]` and `down[E, D, F]`, each expert quantised
    along its last dimension and packed as `ir.quantized` says. Experts are dequantised to x's dtype.

    With an `activation_scheme` (a dynamic one of `spec.quant.ActivationScheme`) both products take rounded
    rows, and all is computed in float32 but for the result.
    """
    columns = 1 if activation.startswith("plain:") else 2
    inner = gate_up_codes.shape[1] // columns

    def experts(expert: int) -> tuple[Tensor, Tensor]:
        gate_up = _dequantized(
            (gate_up_codes, gate_up_scales, gate_up_zeros), expert, gate_up_scheme, x.shape[-1]
        )
        down = _dequantized((down_codes, down_scales, down_zeros), expert, down_scheme, inner)
        dtype = torch.float32 if activation_scheme else x.dtype
        return gate_up.to(dtype), down.to(dtype)

    settings = (activation, interleaved, alpha, limit)
    biases = (gate_up_bias, down_bias)
    return _mixture(x, expert_ids, expert_weights, experts, *biases, settings, activation_scheme)


def _dequantized(
    parts: tuple[Tensor, Tensor, Tensor | None], expert: int, scheme: str, in_features: int
) -> Tensor:
    codes, scales, zeros = parts
    own_zeros = None if zeros is None else zeros[expert]
    return dequantize_rows(codes[expert], scales[expert], own_zeros, parse_scheme(scheme), in_features)


@quantized_moe.register_fake
def _(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_codes: Tensor,
    down_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_scheme: str,
    down_scheme: str,
    activation_scheme: str = "",
) -> Tensor:
    return x.new_empty(x.shape)
