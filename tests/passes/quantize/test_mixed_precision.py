"""Schemes by influence: what is measured, what is chosen and said, and that it beats one scheme for all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.ir.weights import Constant, Unbound
from llmc.passes.base import PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.calibration import Calibration
from llmc.passes.graph import argument, calls, weight_nodes
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.mixed_precision import MixedPrecision
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.sensitivity import Sensitivity, judged_pieces
from llmc.spec.errors import ModelError, RecipeError

ops = torch.ops.llmc
SMALL = {"schemes": "int4_channel, int4_g32, int8_g32, keep", "tokens": 64}


def calibration(program, folder):
    sequences = tuple(sequence for seed in range(4) for sequence in probe_sequences(program.spec, seed))
    return Calibration(sequences=sequences, source="random tokens", folder=folder)


def quantize(program, folder, **options):
    context = PassContext(calibration=calibration(program, folder))
    passes = (MixedPrecision(expect=1, **(SMALL | options)),)
    return run_passes(program, passes, context, [Verification(), NumericContract()])


def mean_kl(was, became):
    p, q = (torch.log_softmax(rows.double(), -1) for rows in (was, became))
    return float((p.exp() * (p - q)).sum(-1).mean())


def chosen_in_graph(program):
    """The scheme of each weight as the operators carry it."""
    found = {}
    for node in calls(program.graph, ops.quantized_linear.default, ops.quantized_embedding.default):
        name = str(argument(node, "codes").target).removesuffix(".codes")
        found[name] = str(argument(node, "scheme"))
    for node in calls(program.graph, ops.quantized_moe.default):
        for part in ("gate_up", "down"):
            name = str(argument(node, f"{part}_codes").target).removesuffix(".codes")
            found[name] = str(argument(node, f"{part}_scheme"))
    return found


@pytest.mark.parametrize(
    ("method", "budget"), [("gptq", 6.5), ("gptq", 12.0), ("scale_search", 8.0), ("rtn", 7.0)]
)
def test_the_graph_has_the_schemes_that_the_report_names_and_keeps_to_the_budget(
    toy, tmp_path, method, budget
):
    program = toy(bias=True, hidden=64, ffn=96, vocab=200)
    done = quantize(program, tmp_path, method=method, budget=budget)
    record = done.history[-1]
    whole, *own = record.decisions
    assert bits_per_weight(done) <= budget
    assert whole.subject == "budget"
    assert whole.choice == f"{bits_per_weight(done):.3f} bits per weight"
    said = {decision.subject: decision.choice for decision in own if decision.choice != "kept"}
    assert said == chosen_in_graph(done)
    assert record.matches == len(said)
    for decision in own:
        assert "keep (32.00 bits) 0.00e+00" in decision.reason
        assert decision.reason.count("bits)") >= 3


def test_influence_is_the_divergence_of_the_whole_program(toy, tmp_path):
    """From the segment on that reads a weight, as from the start; tied tables are read twice."""
    program = toy(bias=True, tied=True)
    pieces = judged_pieces(calibration(program, tmp_path), 64)
    sensitivity = Sensitivity(program, pieces)
    matrices = [name for name in weight_nodes(program.graph) if len(program.weights[name].shape) == 2]
    assert len(matrices) == 15
    for name in matrices:
        value = program.weights.evaluate(name)
        other = value + 0.1 * value.std() * torch.randn(value.shape)
        changed = program.replace(weights=program.weights.with_entries({name: Constant(other)}))
        expected = mean_kl(logits_of(program, pieces), logits_of(changed, pieces))
        assert expected > 1e-7
        assert sensitivity.divergence({name: other}) == pytest.approx(expected, rel=1e-3), name


def test_pieces_are_spread_over_the_calibration_and_never_too_many(tmp_path):
    sequences = tuple(tuple(range(start, start + size)) for start, size in ((0, 3), (100, 50), (200, 90)))
    data = Calibration(sequences=sequences, source="", folder=tmp_path)
    assert judged_pieces(data, 33) == [(0, 1, 2), tuple(range(100, 115)), tuple(range(200, 215))]
    assert sum(map(len, judged_pieces(data, 4096))) == 143


@pytest.mark.parametrize("method", ["scale_search", "rtn"])
def test_experts_get_their_scheme_together(toy, tmp_path, method):
    done = quantize(toy(experts=4, hidden=64, ffn=96), tmp_path, budget=7.0, method=method)
    found = chosen_in_graph(done)
    for layer in range(2):
        pair = {found.get(f"layers.{layer}.mlp.{part}") for part in ("gate_up", "down")}
        assert len(pair) == 1
    assert not [name for name in found if "router" in name]


def test_planning_keeps_to_the_budget_without_looking_at_a_weight(toy):
    program = toy(hidden=64, ffn=96, vocab=200)
    unbound = {
        name: Unbound(name, tuple(program.weights[name].shape), program.weights[name].dtype)
        for name in program.used_weights()
    }
    program = program.replace(weights=program.weights.with_entries(unbound))
    done = run_passes(program, (MixedPrecision(budget=8, **SMALL),), PassContext(planning=True))
    assert 7.5 < bits_per_weight(done) <= 8
    assert len(set(chosen_in_graph(done).values())) > 1


def test_a_budget_that_cannot_be_kept_is_refused_with_what_can(toy, tmp_path):
    with pytest.raises(RecipeError) as caught:
        quantize(toy(), tmp_path, budget=2, schemes="int4_channel, int8_channel")
    assert caught.value.code == "mixed_precision.budget"
    least = float(caught.value.why.split("takes ")[1].split(" to ")[0])
    assert f"at least {least:.3f}" in caught.value.fix or f"at least {least + 0.001:.3f}" in caught.value.fix
    done = quantize(toy(), tmp_path, budget=least + 0.001, schemes="int4_channel, int8_channel")
    assert set(chosen_in_graph(done).values()) == {"int4_channel"}


def test_bits_are_spent_until_the_divergence_is_small_enough(toy, tmp_path):
    program = toy(hidden=64, ffn=96, vocab=200)
    options = {"budget": 0, "schemes": "int4_g32, int8_g32", "method": "rtn"}
    made = {limit: quantize(program, tmp_path, enough=limit, **options) for limit in (0.0, 0.01, 10.0)}
    bits = [bits_per_weight(made[limit]) for limit in (10.0, 0.01, 0.0)]
    assert {name.partition("_")[0] for name in chosen_in_graph(made[10.0]).values()} == {"int4"}
    assert {name.partition("_")[0] for name in chosen_in_graph(made[0.0]).values()} == {"int8"}
    assert bits == sorted(bits)
    kept_to = smallest = 0.0
    for decision in made[0.01].history[-1].decisions[1:]:
        found = re.findall(r"(int\d)\S* \([\d.]+ bits\) ([\d.e+-]+)", decision.reason)
        tried = {name: float(value) for name, value in found}
        smallest += tried.get("int4", 0.0)
        kept_to += tried.get(decision.choice.partition("_")[0], 0.0)
    assert kept_to <= 0.01 * 1.01 < smallest  # said to three digits


def test_learning_after_a_method_without_codes_is_refused():
    with pytest.raises(RecipeError, match="does not follow the method 'rtn'"):
        MixedPrecision(method="rtn", epochs=2)


@pytest.mark.parametrize(
    ("schemes", "text"),
    [("", "no scheme"), (" , ", "no scheme"), ("int5_g32", "int5_g32"), ("int4_g32, nf4_g64", "nf4_g64")],
)
def test_schemes_that_are_none_are_refused_as_the_recipe_is_read(schemes, text):
    with pytest.raises(RecipeError, match=text):
        MixedPrecision(schemes=schemes)


def test_influence_needs_tokens_and_finite_logits(toy, tmp_path):
    program = toy()
    with pytest.raises(RecipeError, match="no calibration data"):
        run_passes(program, (MixedPrecision(budget=20, **SMALL),), PassContext())
    norm = next(name for name in program.used_weights() if name == "norm.weight")
    broken = Constant(torch.full(program.weights[norm].shape, float("nan")))
    program = program.replace(weights=program.weights.with_entries({norm: broken}))
    with pytest.raises(ModelError, match="logits on calibration tokens are not finite"):
        run_passes(
            program,
            (MixedPrecision(budget=20, **SMALL),),
            PassContext(calibration=calibration(program, tmp_path)),
        )


@pytest.fixture(scope="module")
def story_model(stories_1m):
    checkpoint = open_checkpoint(stories_1m)
    program = bind_checkpoint(trace_config(checkpoint.config, dtype=torch.float32), checkpoint)
    return run_passes(program, (*canonicalise(), *fuse()), PassContext())


@pytest.fixture(scope="module")
def story_tokens(stories_1m, heldout_stories):
    tokenizer = Tokenizer.from_file(str(Path(stories_1m) / "tokenizer.json"))
    encoded = [tuple(tokenizer.encode(story).ids[:256]) for story in heldout_stories]
    return [ids for ids in encoded if len(ids) > 32]


@pytest.mark.parametrize(
    ("method", "uniform", "group_size", "tokens"),
    [("rtn", Rtn, 64, 256), pytest.param("gptq", Gptq, 32, 512, marks=pytest.mark.slow)],
)
def test_a_mixture_loses_less_than_one_scheme_of_as_many_bytes(
    story_model, story_tokens, tmp_path, method, uniform, group_size, tokens
):
    """By the divergence on other text than that on which influence was measured."""
    data = Calibration(sequences=tuple(story_tokens[:20]), source="stories", folder=tmp_path)
    text = story_tokens[30:46]
    exact = logits_of(story_model, text)

    def found(pass_):
        done = run_passes(story_model, (pass_,), PassContext(calibration=data))
        return done, mean_kl(exact, logits_of(done, text))

    alike, uniform_kl = found(uniform(bits=4, group_size=group_size, head_bits=4, embedding_bits=4))
    budget = bits_per_weight(alike)
    mixed, mixed_kl = found(MixedPrecision(budget=budget, method=method, tokens=tokens))
    assert bits_per_weight(mixed) <= budget
    assert mixed_kl < uniform_kl
