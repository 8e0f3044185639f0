"""Traced families come out of the canonicalise stage with the same logits, in the vocabulary promised."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llmc.ir.printer import print_program
from llmc.passes.base import CANONICAL, PassContext
from llmc.passes.canonical import canonical_passes
from llmc.passes.manager import run_passes
from llmc.passes.rewrite import operator_of

PLAIN = {"reshape", "slice", "add", "mul", "div"}

# family -> (ropes, gated activations, operators beside llmc:: and views, sums and scalings); 4 layers each.
EXPECTED = {
    "llama": (8, 4, set()),
    "llama-yarn": (8, 4, set()),
    "qwen2": (8, 4, set()),
    "qwen3": (8, 4, set()),
    "gemma2": (8, 4, set()),
    "gemma3": (8, 4, set()),
    "phi3": (8, 4, set()),
    "smollm3": (6, 4, set()),
    "gpt_neox": (8, 0, {"gelu"}),
    "gpt2": (0, 0, {"gelu"}),
    "hunyuan_dense": (8, 4, set()),
    "glm": (8, 4, set()),
    "olmo": (8, 4, {"clamp"}),
    "nanochat": (8, 0, {"relu", "square"}),
    "gpt_oss": (8, 0, {"softmax", "topk", "getitem"}),
    "deepseek_v3": (8, 4, None),
}
MORE = {
    "llama3": (8, 4, set()),
    "mistral": (8, 4, set()),
    "ministral": (8, 4, set()),
    "ministral3": (8, 4, {"floor", "log"}),
    "gemma": (8, 4, set()),
    "gemma4": (8, 8, {"select"}),
    "phi3-longrope": (8, 4, set()),
    "phi": (8, 0, {"gelu"}),
    "granite": (8, 4, set()),
    "olmo2": (8, 4, set()),
    "olmo3": (8, 4, set()),
    "starcoder2": (8, 0, {"gelu"}),
    "cohere": (8, 4, set()),
    "cohere2": (6, 4, set()),
    "glm4": (8, 4, set()),
    "exaone4": (6, 4, set()),
    "ernie4_5": (8, 4, set()),
    "seed_oss": (8, 4, set()),
    "arcee": (8, 0, {"relu", "square"}),
    "apertus": (8, 0, None),
    "nemotron": (8, 0, {"relu", "square"}),
    "helium": (8, 4, set()),
    "bitnet": (8, 4, set()),
    "opt": (0, 0, {"relu"}),
    "gpt_bigcode": (0, 0, {"gelu"}),
    "qwen3_moe": (8, 0, {"softmax", "topk", "getitem"}),
    "mixtral": (8, 0, None),
    "deepseek_v2": (8, 4, None),
}


def _operators(program):
    return Counter(operator_of(node) for node in program.graph.nodes if node.op == "call_function")


def _check(name, expected, family, apply, closeness):
    ropes, gated, rest = expected
    traced = family(name)
    canonical = apply(traced, *canonical_passes())
    found = _operators(canonical)
    assert CANONICAL in canonical.facts
    assert found["llmc.rope"] == ropes
    assert found["llmc.gated_activation"] + found["llmc.gated_activation_packed"] == gated
    assert not {"cos", "sin", "polar", "linear", "addmm", "embedding", "view", "transpose"} & set(found)
    if rest is not None:
        generic = {operator for operator in found if not operator.startswith("llmc.")}
        assert generic - PLAIN == rest
    assert closeness(traced, canonical) <= 1e-5


@pytest.mark.parametrize("name", EXPECTED)
def test_families_of_every_kind_are_canonical(name, family, apply, closeness):
    _check(name, EXPECTED[name], family, apply, closeness)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_other_families_are_canonical(name, family, apply, closeness):
    _check(name, MORE[name], family, apply, closeness)


@pytest.mark.parametrize("name", ["qwen3", "glm"])
def test_low_precision_changes_no_match(name, family, apply):
    low = apply(family(name, torch.bfloat16), *canonical_passes())
    full = apply(family(name), *canonical_passes())
    assert _operators(low) == _operators(full)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_pass_alone_keeps_the_logits(name, family, closeness):
    program = family(name)
    for pass_ in canonical_passes():
        after = run_passes(program, [pass_], PassContext())
        assert closeness(program, after) <= 1e-6, pass_.name
        program = after


def test_running_the_stage_twice_changes_nothing_more(family, apply):
    once = apply(family("qwen3"), *canonical_passes())
    twice = apply(once, *canonical_passes())
    assert _operators(once) == _operators(twice)
    assert all(record.matches == 0 for record in twice.history[len(once.history) :])


def test_a_canonical_llama_reads_like_this(family, apply, golden):
    golden(print_program(apply(family("llama"), *canonical_passes())), "llama.txt")


def test_a_canonical_phi3_reads_like_this(family, apply, golden):
    golden(print_program(apply(family("phi3"), *canonical_passes())), "phi3.txt")


def test_the_input_program_is_left_alone(family, apply):
    program = family("llama")
    before = print_program(program)
    apply(program, *canonical_passes())
    assert print_program(program) == before
