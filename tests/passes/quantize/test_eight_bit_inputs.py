"""8-bit weights and inputs: balancing keeps the function, rounding goes where it is said to go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmc.ir.weights import Constant
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.graph import argument, calls
from llmc.passes.instruments import Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.fp8 import Fp8
from llmc.passes.quantize.ranges import channel_ranges
from llmc.passes.quantize.round_inputs import RoundInputs
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.smooth import Smooth
from llmc.spec.errors import RecipeError

ops = torch.ops.llmc
FUSE = (FuseQkv(), FuseGateUp(), FuseAddNorm())


def calibrated(program):
    sequences = probe_sequences(program.spec, seed=5)
    return PassContext(calibration=Calibration(sequences=sequences, source="a test", folder=Path("unused")))


def run(program, *passes):
    return run_passes(program, passes, calibrated(program), [Verification()])


def error(program, done):
    sequences = probe_sequences(program.spec, seed=9)
    expected = logits_of(program, sequences)
    return float((logits_of(done, sequences) - expected).abs().mean() / expected.abs().mean())


def with_outliers(program, times):
    """A copy of the same function whose norms give a few channels `times` larger."""
    done, entries = program, {}
    for norm in calls(done.graph, ops.rms_norm.default):
        readers = [user for user in norm.users if user.target is ops.linear.default]
        if len(readers) != len(norm.users):
            continue
        weight = argument(norm, "weight").target
        factors = torch.ones(program.weights[weight].shape[0])
        factors[::16] = times
        entries[weight] = Constant(program.weights.evaluate(weight) * factors)
        for reader in readers:
            name = argument(reader, "weight").target
            entries[name] = Constant(program.weights.evaluate(name) / factors)
    assert entries
    return done.replace(weights=done.weights.with_entries(entries))


@pytest.mark.parametrize("fused", [(), FUSE])
def test_balancing_changes_weights_and_not_the_function(toy, fused):
    program = run(with_outliers(toy(), 60.0), *fused)
    done = run(program, Smooth(expect=1))
    assert error(program, done) < 1e-6
    (record,) = done.history[-1:]
    assert record.matches == len(record.decisions) > 1
    changed = [n for n in program.weights if program.weights[n] is not done.weights[n]]
    assert changed
    for name in changed:
        ratio = done.weights.evaluate(name) / program.weights.evaluate(name)
        powers = ratio[ratio.isfinite() & (ratio != 0)].abs().log2()
        assert torch.equal(powers, powers.round())


def test_balancing_recovers_what_outliers_cost(toy):
    plain = toy()
    planted = with_outliers(plain, 60.0)
    assert error(plain, planted) < 1e-5
    rounding = (Rtn(bits=8, group_size=0), RoundInputs(head=True))
    least, lost = error(plain, run(plain, *rounding)), error(plain, run(planted, *rounding))
    recovered = error(plain, run(planted, Smooth(alpha=0.8), *rounding))
    assert lost > 2 * least
    assert (lost - recovered) / (lost - least) > 0.8


def test_what_balancing_saves_too_little_of_is_left(toy):
    planted = with_outliers(toy(), 60.0)
    done = run(planted, Smooth(least_gain=1.0))
    assert all(done.weights[name] is planted.weights[name] for name in planted.weights)
    assert {decision.choice for decision in done.history[-1].decisions} == {"left as it is"}
    for decision in run(planted, Smooth()).history[-1].decisions:
        found, plain = map(float, decision.reason.split("relative error ")[1].split(", without "))
        if abs(found / plain - 0.8) > 0.01:  # they are rounded where they are said
            assert (decision.choice == "left as it is") == (found > 0.8 * plain), decision


def test_balancing_without_tokens_is_refused(toy):
    with pytest.raises(RecipeError, match="no calibration data"):
        run_passes(toy(), (Smooth(),), PassContext())


def test_inputs_are_rounded_where_weights_are_codes(toy):
    program = toy()
    done = run(program, Rtn(bits=8, group_size=0), RoundInputs(scheme="int8_g32"))
    nodes = calls(done.graph, ops.quantized_linear.default)
    asked = [argument(node, "activation") for node in nodes]
    assert asked[-1] == ""
    assert set(asked[:-1]) == {"int8_g32"}
    whole = run(program, Rtn(bits=8, group_size=0), RoundInputs(head=True))
    assert all(
        argument(n, "activation") == "int8_token" for n in calls(whole.graph, ops.quantized_linear.default)
    )
    again = run(whole, RoundInputs(scheme="int8_g32", head=True))
    assert again.history[-1].matches == 0
    assert 1e-4 < error(program, done) < 0.05


def test_8_bit_floats(toy):
    program = toy()
    done = run(program, Fp8(expect=1))
    nodes = calls(done.graph, ops.quantized_linear.default)
    assert {argument(node, "scheme") for node in nodes} == {"fp8_channel"}
    assert {argument(node, "activation") for node in nodes} == {"fp8_token"}
    assert len(calls(done.graph, ops.linear.default)) == 1
    weights_alone = run(program, Fp8(weights="fp8_b128x128", inputs=""))
    assert 0 < error(program, weights_alone) < error(program, done) * 1.5 < 0.2


@pytest.mark.parametrize("shape", [{}, {"experts": 4}], ids=["linears", "experts"])
def test_static_scales_cover_what_calibration_saw(toy, shape):
    """The largest input of each product takes the largest code, so none is cut off on the same tokens."""
    program = run(toy(**shape), *FUSE)
    done = run(program, Fp8(inputs="fp8_static", expect=1))
    nodes = calls(done.graph, ops.quantized_linear.default)
    assert {argument(node, "activation") for node in nodes} == {"fp8_static"}
    mixtures = calls(done.graph, ops.quantized_moe.default)
    assert {argument(node, "activation_scheme") for node in mixtures} <= {"fp8_token"}
    graph = done.copy_graph()
    nodes = calls(graph, ops.quantized_linear.default)
    inputs = [argument(node, "x") for node in nodes]
    ranges = channel_ranges(done.replace(graph=graph), inputs, calibrated(program).calibration)
    scales = [float(done.weights.evaluate(str(argument(node, "activation_scale").target))) for node in nodes]
    # what reaches later ones has been through rounding
    assert scales[0] == pytest.approx(float(ranges[inputs[0]].max()) / 448, rel=1e-6)
    assert all(
        scale == pytest.approx(float(ranges[x].max()) / 448, rel=0.3)
        for scale, x in zip(scales, inputs, strict=True)
    )
    assert 0 < error(program, done) < 0.2


def test_static_scales_need_tokens_and_weights_by_row(toy):
    with pytest.raises(RecipeError, match="no calibration data"):
        run_passes(toy(), (Fp8(inputs="fp8_static"),), PassContext())
    with pytest.raises(RecipeError, match="before weights in the scheme fp8_b128x128"):
        Fp8(inputs="fp8_static", weights="fp8_b128x128")


def test_experts_have_their_inputs_rounded(toy):
    program = toy(experts=4)
    done = run(program, Rtn(bits=8, group_size=0), RoundInputs())
    mixtures = calls(done.graph, ops.quantized_moe.default)
    assert mixtures
    assert all(argument(node, "activation_scheme") == "int8_token" for node in mixtures)
    assert 1e-4 < error(program, done) < 0.1
