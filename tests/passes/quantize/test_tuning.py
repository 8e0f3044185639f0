"""Codes and scales learnt from logits: closer than before on text kept to judge by, or left as they were."""

from __future__ import annotations

import pytest
import torch

from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.instruments import Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.gradients import LogitsRun
from llmc.passes.quantize.rounding import Tuning
from llmc.passes.quantize.tuning import split_sequences
from llmc.passes.quantize.walk import packed_inputs, raised

FUSE = (FuseQkv(), FuseGateUp(), FuseAddNorm())
ROUND = {"bits": 3, "group_size": 32, "head_bits": 8}


def sequences(vocab, count, seed):
    """Tokens that follow each other by a rule, with a little chance."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = [int(torch.randint(vocab, (1,), generator=draw))]
        while len(ids) < 48:
            ids.append((ids[-1] * 7 + int(torch.randint(3, (1,), generator=draw))) % vocab)
        made.append(tuple(ids))
    return tuple(made)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Toys learn from little."""
    monkeypatch.setattr("llmc.passes.quantize.tuned._FEWEST_TOKENS", 0)


def context(folder, count=64):
    found = sequences(61, count, 0)
    return PassContext(calibration=Calibration(sequences=found, source="a rule", folder=folder))


def run(program, within, *passes):
    return run_passes(program, passes, within, [Verification()])


def divergence(program, exact, text):
    found = torch.log_softmax(logits_of(program, text), -1)
    reference = torch.log_softmax(exact, -1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def test_tuning_comes_closer_on_other_text(toy, tmp_path):
    program = run(toy(hidden=64, ffn=96, tied=True), PassContext(), *FUSE)
    text = sequences(61, 8, 1)
    exact = logits_of(program, text)
    coarse = {"bits": 3, "group_size": 0, "head_bits": 8, "search": False, "rounds": 0, "catch_up": 0.0}
    plain = run(program, context(tmp_path), Gptq(**coarse))
    tuned = run(program, context(tmp_path), Gptq(**coarse, epochs=2))
    assert divergence(tuned, exact, text) < divergence(plain, exact, text)
    decision = next(entry for entry in tuned.history[-1].decisions if entry.subject == "tuning")
    assert decision.choice == "2 epochs"
    again = run(program, context(tmp_path / "other"), Gptq(**coarse, epochs=2))
    for name in again.used_weights():
        assert torch.equal(again.weights.evaluate(name), tuned.weights.evaluate(name))


@pytest.mark.parametrize(
    "shape",
    [{"experts": 4}, {"windows": (5, 0), "sinks": True}, {"norm": "layer_norm", "bias": True}, {}],
    ids=["experts", "windows", "layer norms", "llama"],
)
def test_gradients_flow_through_what_gives_the_logits(toy, shape):
    program = run(toy(**shape), PassContext(), *FUSE)
    inputs = packed_inputs(sequences(61, 2, 3))
    weights = {name: raised(program.weights.evaluate(name)).clone() for name in program.used_weights()}
    # behind the last choice of experts, since choices jump
    part = "layers.1.mlp.down" if "experts" in shape else "layers.0.attn"
    name = next(entry for entry in weights if entry.startswith(part) and weights[entry].dim() > 1)
    weights[name].requires_grad_()
    found = LogitsRun(program).logits(inputs, weights.__getitem__, gradients=True)
    assert torch.allclose(found, logits_of(program, sequences(61, 2, 3)), rtol=1e-4, atol=1e-4)
    scored = found.double().square().mean()
    scored.backward()
    slope = weights[name].grad.clone()
    turn, step = torch.randn(slope.shape, generator=torch.Generator().manual_seed(4)), 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            moved = dict(weights) | {name: weights[name] + sign * step * turn}
            logits = LogitsRun(program).logits(inputs, moved.__getitem__, gradients=False)
            ends.append(float(logits.double().square().mean()))
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((slope * turn).sum()) == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_what_costs_too_much_or_cannot_be_judged_is_left(toy, tmp_path):
    program = run(toy(), PassContext(), *FUSE)
    for within, work, why in [
        (context(tmp_path), 1e-9, "million million"),
        (context(tmp_path / "one", 1), 20.0, "one sequence"),
    ]:
        plain = run(program, within, Gptq(**ROUND))
        done = run(program, within, Gptq(**ROUND, epochs=2, work=work))
        decision = next(entry for entry in done.history[-1].decisions if entry.subject == "tuning")
        assert decision.choice == "none"
        assert why in decision.reason
        for name in plain.used_weights():
            assert torch.equal(plain.weights.evaluate(name), done.weights.evaluate(name))


def test_few_tokens_are_not_learnt_from(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("llmc.passes.quantize.tuned._FEWEST_TOKENS", 16384)
    done = run(run(toy(), PassContext(), *FUSE), context(tmp_path), Gptq(**ROUND, epochs=1))
    assert "too few" in done.history[-1].decisions[-1].reason


def test_tuning_that_does_not_help_is_not_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("llmc.passes.quantize.tuning._CODE_TRAVEL", 1e4)
    monkeypatch.setattr("llmc.passes.quantize.tuning._LARGEST_CODE_STEP", 1e4)
    program = run(toy(), PassContext(), *FUSE)
    done = run(program, context(tmp_path), Gptq(**ROUND, epochs=1))
    decision = next(entry for entry in done.history[-1].decisions if entry.subject == "tuning")
    assert decision.choice == "none"
    assert "did not help" in decision.reason


def test_larger_models_get_fewer_epochs():
    tuning = Tuning(epochs=4, work=1.0)
    assert tuning.affordable(1_000_000, 32_768) == 4
    assert tuning.affordable(3_000_000, 32_768) == 2
    assert tuning.affordable(500_000_000, 32_768) == 0


def test_one_sequence_in_eight_is_kept_to_judge_by(tmp_path):
    calibration = context(tmp_path, 20).calibration
    learnt, judged = split_sequences(calibration)
    assert len(judged) == 3
    assert sorted([*learnt, *judged]) == sorted(calibration.sequences)
