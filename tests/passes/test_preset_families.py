"""Whole presets on small real architectures, each pass held to its contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.presets import preset_named
from llmc.passes.probe import probe_sequences, with_random_weights

CONTEXT = PassContext(max_tokens=64, max_model_len=64)
FAST = ("llama3", "deepseek_v2", "gpt_oss")
SUPPORTED = {family.name: family for family in FAMILIES if family.refused is None}

# What each of these must match, of 4 layers: an architecture that stops matching is slower in silence.
MATCHES = {
    "llama3": {
        "fuse_qkv": 4,
        "fuse_gate_up": 4,
        "fuse_add_norm": 7,
        "gptq": 17,
        "fuse_rope_cache": 4,
        "narrow_rows": 7,
    },
    "qwen3": {
        "fuse_qkv": 4,
        "fuse_gate_up": 4,
        "fuse_add_norm": 7,
        "gptq": 18,
        "fuse_rope_cache": 4,
        "narrow_rows": 7,
    },
    "gemma2": {
        "fuse_qkv": 4,
        "fuse_gate_up": 4,
        "fuse_add_norm": 7,
        "gptq": 17,
        "fuse_rope_cache": 4,
        "narrow_rows": 9,
    },
    "phi": {"fuse_qkv": 4, "fuse_add_norm": 3, "fuse_rope_cache": 4, "narrow_rows": 7},
    "gpt2": {"fuse_add_norm": 8, "gptq": 18, "narrow_rows": 7},
    "gpt_oss": {"fuse_qkv": 4, "fuse_add_norm": 7, "gptq": 18, "fuse_rope_cache": 4, "narrow_rows": 8},
    "deepseek_v2": {"fuse_qkv": 4, "fuse_gate_up": 4, "fuse_add_norm": 7, "gptq": 32, "narrow_rows": 12},
}


def compiled(name, preset, dtype, folder):
    family = SUPPORTED[name]
    config = getattr(transformers, family.config)(**family.options)
    program = with_random_weights(trace_config(config, dtype=dtype), 0)
    sequences = probe_sequences(program.spec, 7)
    calibration = Calibration(sequences=sequences, source="random tokens", folder=folder)
    context = replace(CONTEXT, calibration=calibration)
    return run_passes(program, preset_named(preset).build(), context, [Verification(), NumericContract()])


def names(*, slow):
    marks = (pytest.mark.slow,) if slow else ()
    return [pytest.param(name, marks=marks) for name in SUPPORTED if (name in FAST) != slow]


@pytest.mark.parametrize("name", names(slow=False) + names(slow=True))
def test_int4_keeps_every_contract(name, tmp_path):
    done = compiled(name, "int4", torch.float32, tmp_path)
    matches = {record.name: record.matches for record in done.history}
    for pass_name, expected in MATCHES.get(name, {}).items():
        assert matches[pass_name] == expected, pass_name
    assert {"paged", "planned", "quantized"} <= done.facts
    assert matches["paged_attention"] == len(done.spec.attention)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MATCHES))
@pytest.mark.parametrize("preset", ["none", "int8"])
def test_presets_hold_in_bfloat16(name, preset, tmp_path):
    compiled(name, preset, torch.bfloat16, tmp_path)
