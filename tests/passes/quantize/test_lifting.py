"""8 bits for linears that change the output most: what is chosen, within which bytes, and what is said."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import llmc.passes.quantize.lifted as lifted
from llmc.ir.weights import Unbound
from llmc.passes.base import PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.calibration import Calibration
from llmc.passes.graph import argument, calls
from llmc.passes.manager import run_passes
from llmc.passes.probe import probe_sequences
from llmc.passes.quantize.gptq import Gptq
from llmc.spec.errors import RecipeError

ops = torch.ops.llmc
SHAPE = {"hidden": 64, "ffn": 96, "vocab": 200}


def quantize(program, folder, **options):
    sequences = tuple(sequence for seed in range(4) for sequence in probe_sequences(program.spec, seed))
    data = Calibration(sequences=sequences, source="random tokens", folder=folder)
    return run_passes(program, (Gptq(expect=1, **options),), PassContext(calibration=data))


def schemes(program):
    """By linear, as the operators carry them."""
    return {
        str(argument(node, "codes").target).removesuffix(".codes"): str(argument(node, "scheme"))
        for node in calls(program.graph, ops.quantized_linear.default)
    }


def growth(program, plain):
    return bits_per_weight(program) / bits_per_weight(plain) - 1


@pytest.mark.parametrize("options", [{}, {"group_size": 128}, {"symmetric": False}], ids=str)
def test_the_report_says_what_was_lifted_and_the_bytes_stay_within_the_share(toy, tmp_path, options):
    program = toy(bias=True, **SHAPE)
    plain, done = quantize(program, tmp_path, **options), quantize(program, tmp_path, growth=0.1, **options)
    before, after = schemes(plain), schemes(done)
    changed = {name for name in after if before[name].startswith("int4") and after[name] != before[name]}
    assert changed
    assert {after[name] for name in changed} == {"int8_channel"}  # a row is shorter than a group of 128
    assert 0 < growth(done, plain) <= 0.1 + 1e-9
    first, *others = done.history[-1].decisions
    assert first.subject == "lift"
    assert first.choice.startswith(f"{len(changed)} of ")
    assert f"{growth(done, plain):.2%} more bytes" in first.reason
    measured = {decision.subject for decision in others if "nats of divergence alone" in decision.reason}
    assert measured == {decision.subject for decision in others}


def test_no_other_choice_within_the_share_changes_less(toy, tmp_path, monkeypatch):
    """Against all of them, for influences drawn at random; tables may give bytes up."""
    program = toy(**SHAPE)
    seen = []

    def drawn(program, units, sensitivity, method, calibration):
        losses = [torch.rand(len(unit.forms)).tolist() for unit in units]
        seen.extend(zip(units, losses, strict=True))
        return losses

    monkeypatch.setattr(lifted, "measure_influence", drawn)
    plain, done = quantize(program, tmp_path), quantize(program, tmp_path, growth=0.12)
    count = sum(math.prod(program.weights[name].shape) for name in program.used_weights())
    stored = round(bits_per_weight(plain) * count / 8)
    extra = [[form.num_bytes - unit.forms[0].num_bytes for form in unit.forms] for unit, _ in seen]
    assert any(more < 0 for own in extra for more in own)
    choices = product(*(range(len(unit.forms)) for unit, _ in seen))
    fitting = [
        chosen
        for chosen in choices
        if sum(own[index] for own, index in zip(extra, chosen, strict=True)) <= int(0.12 * stored)
    ]
    best = min(sum(lost[i] for (_, lost), i in zip(seen, chosen, strict=True)) for chosen in fitting)
    found = {decision.subject: decision.choice for decision in done.history[-1].decisions}
    names = [[form.schemes[0].name for form in unit.forms] for unit, _ in seen]
    got = [own.index(found[unit.names[0]]) for (unit, _), own in zip(seen, names, strict=True)]
    assert sum(lost[i] for (_, lost), i in zip(seen, got, strict=True)) == pytest.approx(best)
    assert growth(done, plain) <= 0.12 + 1e-9


def test_a_model_on_which_measuring_takes_too_much_is_left_as_it_is(toy, tmp_path):
    program = toy(**SHAPE)
    plain, done = quantize(program, tmp_path), quantize(program, tmp_path, growth=0.1, work=1e-6)
    assert schemes(done) == schemes(plain)
    first = done.history[-1].decisions[0]
    assert (first.subject, first.choice) == ("lift", "none")
    assert "million million products are more than 1e-06" in first.reason


def test_a_plan_is_the_least_that_is_taken_and_looks_at_no_weight(toy):
    program = toy(**SHAPE)
    unbound = {
        name: Unbound(name, tuple(program.weights[name].shape), program.weights[name].dtype)
        for name in program.used_weights()
    }
    program = program.replace(weights=program.weights.with_entries(unbound))
    plain, done = (
        run_passes(program, (Gptq(growth=share),), PassContext(planning=True)) for share in (0.0, 0.1)
    )
    assert schemes(done) == schemes(plain)
    assert "up to 10.00% more bytes" in done.history[-1].decisions[0].reason


def test_lifting_without_tokens_is_refused(toy):
    with pytest.raises(RecipeError) as caught:
        run_passes(toy(**SHAPE), (Gptq(growth=0.1),), PassContext())
    assert caught.value.code == "recipe.no_calibration"
