"""Norm modules are told by what they compute, never by what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from llmc.compiler.hf.adapter import config_of
from llmc.compiler.hf.norms import recognise_norm, use_norm_operators
from llmc.models.families import family_named

SPELLINGS = [
    (LlamaRMSNorm(48, eps=3e-6), (False, 3e-6, 0.0, "cast_then_scale")),
    (Gemma2RMSNorm(48, eps=1e-6), (False, 1e-6, 1.0, "scale_then_cast")),
    (Olmo2RMSNorm(48, eps=1e-5), (False, 1e-5, 0.0, "scale_then_cast")),
    (HeliumRMSNorm(48, eps=1e-8), (False, 1e-8, 0.0, "scale_then_cast")),
    (CohereLayerNorm(48, eps=1e-5), (True, 1e-5, 0.0, "scale_then_cast")),
    (OlmoLayerNorm(48), (True, 1e-5, 0.0, "scale_then_cast")),
    (nn.LayerNorm(48, eps=2e-4), (True, 2e-4, 0.0, "scale_then_cast")),
]


@pytest.mark.parametrize(("module", "expected"), SPELLINGS, ids=lambda item: type(item).__name__)
def test_each_spelling_is_told_apart(module, expected):
    found = recognise_norm(module)
    assert found is not None
    assert (found.centred, found.eps, found.offset, found.style) == expected


@pytest.mark.parametrize(("module", "_"), SPELLINGS, ids=lambda item: type(item).__name__)
def test_the_formula_computes_what_the_module_does(module, _):
    module = module.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
    x = (torch.randn(2, 9, 48, generator=generator) * 0.01).to(torch.bfloat16)
    formula = recognise_norm(module)
    with torch.no_grad():
        expected = module(x)
        found = formula.apply(x, getattr(module, "weight", None), getattr(module, "bias", None))
    assert (found != expected).float().mean() < 0.02
    assert torch.allclose(found, expected, rtol=2**-7)


def test_a_subclass_of_layer_norm_is_not_taken_for_one():
    module = NemotronLayerNorm1P(48, eps=1e-5)
    found = recognise_norm(module)
    if found is not None:
        assert found.offset == 1.0


class MeanOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True))


class Scale(MeanOnly):
    def forward(self, x):
        return self.weight * x


class LargeEps(MeanOnly):
    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


class WantsTwo(MeanOnly):
    def forward(self, x, other):
        return x + other


@pytest.mark.parametrize("kind", [MeanOnly, Scale, LargeEps, WantsTwo])
def test_what_is_no_norm_is_left_alone(kind):
    assert recognise_norm(kind()) is None


def test_unknown_eps_is_told_from_the_common_ones():
    class Plain(MeanOnly):
        def forward(self, x):
            n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-8)
            return self.weight * n.to(x.dtype)

    assert recognise_norm(Plain()).eps == 1e-8


@pytest.mark.parametrize(("name", "count"), [("llama", 9), ("gemma3", 25), ("olmo", 9), ("stablelm", 33)])
def test_every_norm_of_a_model_is_found(name, count):
    family = family_named(name)
    model = AutoModelForCausalLM.from_config(config_of(family.config, dict(family.options)))
    with torch.no_grad():
        assert use_norm_operators(model) == count
