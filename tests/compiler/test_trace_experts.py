"""Experts are told by what they compute: their activation is tried, their layout read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmc.compiler.hf.adapter import expert_layout
from llmc.compiler.hf.experts import recognise_experts
from llmc.spec.errors import ModelError


class Experts(nn.Module):
    """What transformers' registry makes of an experts class, with a gate of one's own."""

    def __init__(self, gate, **layout):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 32, 16, device="meta"))
        self.gate = gate
        self.act_fn = F.silu
        defaults = SimpleNamespace(is_transposed=False, has_gate=True, has_bias=False)
        for name, value in {**vars(defaults), **layout}.items():
            setattr(self, name, value)

    def _apply_gate(self, x):
        return self.gate(x)


def halves(function):
    return lambda x: function(x[..., :16]) * x[..., 16:]


def alternating(function):
    return lambda x: function(x[..., 0::2]) * x[..., 1::2]


def clamped(x, limit=7.0, alpha=1.702):
    gate, up = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * alpha)


def block_of(gate, **layout):
    module = Experts(gate, **layout)
    return recognise_experts(module, expert_layout(module), "model.layers.0.mlp.experts")


@pytest.mark.parametrize(
    ("gate", "activation", "interleaved"),
    [
        (halves(F.silu), "silu", False),
        (alternating(F.silu), "silu", True),
        (halves(F.gelu), "gelu", False),
        (halves(lambda x: F.gelu(x, approximate="tanh")), "gelu_tanh", False),
        (halves(F.relu), "relu", False),
        (clamped, "clamped_swiglu", True),
    ],
)
def test_gates_are_told_apart(gate, activation, interleaved):
    block = block_of(gate)
    assert (block.activation, block.interleaved) == (activation, interleaved)


def test_the_clamp_is_read_off():
    block = block_of(clamped)
    assert (block.alpha, block.limit) == (1.702, 7.0)


def test_experts_without_a_gate_are_plain():
    module = Experts(None, has_gate=False)
    module.act_fn = lambda x: F.relu(x).square()
    block = recognise_experts(module, expert_layout(module), "experts")
    assert block.activation == "plain:relu2"


@pytest.mark.parametrize("gate", [halves(torch.sin), lambda x: x[..., 16:] * F.silu(x[..., :16]) + 0.01])
def test_an_unknown_gate_is_refused_by_path(gate):
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts") as caught:
        block_of(gate)
    assert caught.value.code == "model.experts"


def test_normalised_experts_are_refused():
    with pytest.raises(ModelError, match="normalises"):
        block_of(halves(F.silu), has_post_expert_norm=True)


def test_other_modules_are_no_experts():
    assert expert_layout(nn.Linear(4, 4)) is None
