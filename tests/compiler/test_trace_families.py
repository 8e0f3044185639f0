"""Families compile and agree with transformers, or are refused with the error the table names."""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.hf.adapter import config_of
from llmc.compiler.selfcheck import TOLERANCE, self_check
from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES, family_named, swept_families
from llmc.spec.errors import ModelError

FAST = (
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "deepseek_v3",
    "cohere",
    "nemotron",
)
SUPPORTED = [family.name for family in FAMILIES if family.refused is None]
REFUSED = [family.name for family in FAMILIES if family.refused is not None]


def config_for(name):
    family = family_named(name)
    return config_of(family.config, dict(family.options))


def check(name):
    report = self_check(config_for(name))
    assert report.num_steps > 5
    assert 0 < report.max_rel_error <= TOLERANCE
    assert report.num_layers == 4


def test_the_table_is_whole():
    assert len(FAMILIES) == len({family.name for family in FAMILIES}) == 68
    assert len(SUPPORTED) >= 56


def test_the_recorded_sweep_is_of_this_table():
    swept = swept_families()
    assert [row.name for row in swept] == [family.name for family in FAMILIES]
    for row, family in zip(swept, FAMILIES, strict=True):
        assert row.code == family.refused
        assert row.status == ("supported" if family.refused is None else "refused")
        assert row.error is None or row.error <= TOLERANCE


@pytest.mark.parametrize("name", FAST)
def test_family_agrees_with_transformers(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_every_other_family_agrees_with_transformers(name):
    check(name)


@pytest.mark.parametrize("name", REFUSED)
def test_family_is_refused_for_the_stated_reason(name):
    with pytest.raises(ModelError) as caught:
        trace_config(config_for(name), dtype=torch.float32)
    assert caught.value.code == family_named(name).refused
    assert all(part.endswith(".") for part in (caught.value.what, caught.value.why, caught.value.fix))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family_traces_in_bfloat16(name):
    program = trace_config(config_for(name), dtype=torch.bfloat16)
    assert program.spec.compute_dtype == "bfloat16"
    assert len(program.spec.attention) == program.spec.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma2", "phimoe"])
def test_agreement_does_not_hang_on_one_draw_of_weights(name, seed):
    assert self_check(config_for(name), seed=seed).max_rel_error <= TOLERANCE
