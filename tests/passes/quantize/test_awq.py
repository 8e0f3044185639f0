"""Scales moved into norms and back out of weights: nothing changes but what rounding then loses."""

from __future__ import annotations

import torch

from llmc.ir.weights import Constant
from llmc.passes.base import PassContext
from llmc.passes.calibration import Calibration
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.awq import Awq
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.salience import power_of_two_scales, search_salience
from llmc.spec.quant import parse_scheme


def planted(program):
    """`program` with every sixteenth channel behind a norm made 32 times larger, and its readers smaller."""
    changed = {}
    norms = [name for name in program.used_weights() if "norm" in name and name.startswith("layers")]
    for name in norms:
        layer = name.split(".norm")[0]
        part = "attn" if name.split(".")[2].startswith("norm1") else "mlp"
        factor = torch.ones(program.weights[name].shape[0])
        factor[::16] = 32
        changed[name] = Constant(program.weights.evaluate(name) * factor)
        for reader in program.used_weights():
            shape = program.weights[reader].shape
            if reader.startswith(f"{layer}.{part}.") and len(shape) == 2 and shape[1] == len(factor):
                if reader.endswith(("o.weight", "o_proj.weight")):
                    continue
                changed[reader] = Constant(program.weights.evaluate(reader) / factor)
    return program.replace(weights=program.weights.with_entries(changed))


def run(program, folder, *passes):
    sequences = tuple(s for seed in range(4) for s in probe_sequences(program.spec, seed))
    context = PassContext(calibration=Calibration(sequences=sequences, source="random", folder=folder))
    return run_passes(program, passes, context, [Verification(), NumericContract()])


def loss(program, exact):
    return float((logits_of(program, probe_sequences(program.spec, 9)) - exact).pow(2).mean())


def test_scaling_changes_no_logit(toy, tmp_path):
    program = planted(toy(hidden=64, ffn=96))
    done = run(program, tmp_path, Awq(bits=3, group_size=32))
    record = done.history[-1]
    assert record.matches >= 4
    assert any(decision.choice.startswith("exponent") for decision in record.decisions)
    exact = logits_of(program, probe_sequences(program.spec, 9))
    assert torch.allclose(logits_of(done, probe_sequences(program.spec, 9)), exact, rtol=1e-5, atol=1e-5)


def test_planted_outliers_are_recovered(toy, tmp_path):
    program = planted(toy(hidden=64, ffn=96))
    exact = logits_of(program, probe_sequences(program.spec, 9))
    options = {"bits": 4, "group_size": 32, "head_bits": 8}
    plain = loss(run(program, tmp_path, Rtn(**options)), exact)
    scaled = loss(run(program, tmp_path, Awq(bits=4, group_size=32), Rtn(**options)), exact)
    both = loss(run(program, tmp_path, Awq(bits=4, group_size=32), Gptq(**options)), exact)
    assert scaled < 0.5 * plain
    assert both < scaled


def test_scales_are_powers_of_two_and_never_lose():
    draw = torch.Generator().manual_seed(0)
    power = torch.rand(64, generator=draw) ** 6 * 100
    power[5] = 0
    weight = torch.randn(16, 64, generator=draw)
    for exponent in (0.3, 1.0):
        scales = power_of_two_scales(power, exponent)
        assert torch.equal(scales.log2().round(), scales.log2())
        assert scales[5] == 1
    found = search_salience([weight], power, parse_scheme("int3_g32"), steps=10)
    assert found.error <= found.plain_error
    assert torch.equal(power_of_two_scales(torch.zeros(4), 1.0), torch.ones(4))


def test_errors_that_are_not_finite_leave_the_weights_alone():
    power = torch.tensor([1.0, float("inf"), 2.0, 3.0])
    found = search_salience([torch.ones(2, 4)], power, parse_scheme("int4_channel"), steps=4)
    assert found.exponent == 0
