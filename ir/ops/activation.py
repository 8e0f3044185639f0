"""Activations of feed-forward blocks, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .registration import operator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@operator("llmc::gated_activation")
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`, elementwise, for an activation named in `ACTIVATIONS`."""
    return ACTIVATIONS[activation](gate) * up


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate * up)


@operator("llmc::gated_activation_packed")
def gated_activation_packed(gate_up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` where `gate_up[..., 2F]` holds gate then up; gives `[..., F]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@gated_activation_packed.register_fake
def _(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@operator("llmc::softcap")
def softcap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)`, elementwise."""
    return torch.tanh(x / cap) * cap


@softcap.register_fake
def _(x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x)
