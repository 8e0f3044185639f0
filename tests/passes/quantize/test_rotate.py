"""Turning the residual stream and the values of attention: the function stays, or the reason is said."""

from __future__ import annotations

import pytest
import torch

from llmc.ir.rotated import Rotated, rotate_rows
from llmc.ir.weights import Constant, Reader
from llmc.passes.base import PassContext
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.rotate import Rotate
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.recipes import override, preset_recipe
from llmc.spec.errors import RecipeError

FUSE = (FuseQkv(), FuseGateUp(), FuseAddNorm())


def run(program, *passes):
    return run_passes(program, passes, PassContext(), [Verification(), NumericContract()])


def logits(program):
    return logits_of(program, probe_sequences(program.spec, 9))


def distance(program, exact):
    found = logits(program)
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("width", [1, 2, 3, 7, 12, 64, 96, 100, 896])
def test_rotations_are_orthogonal_and_spread_every_element(width):
    matrix = rotate_rows(torch.eye(width), seed=3)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=2e-6)
    assert float(matrix.abs().max()) <= (2 / width) ** 0.5 + 1e-6
    values = torch.randn(5, 2, width)
    assert torch.allclose(rotate_rows(values, 3), values @ matrix, atol=1e-5)
    assert width < 8 or not torch.equal(matrix, rotate_rows(torch.eye(width), seed=4))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_part_of_a_weight_is_turned_in_blocks(dim):
    value = torch.randn(24, 24)
    gain = torch.rand(12) + 0.5
    found = Rotated(Constant(value), dim, 4, 1, 8, 20, Constant(gain), 1.0).evaluate(Reader())
    rows, expected = value.movedim(dim, -1), value.movedim(dim, -1).clone()
    matrix = rotate_rows(torch.eye(4), 1)
    for start in (8, 12, 16):
        expected[:, start : start + 4] = (rows * _whole(gain))[:, start : start + 4] @ matrix
    assert torch.allclose(found, expected.movedim(-1, dim), atol=1e-5)


def _whole(gain):
    return torch.cat([torch.ones(8), gain + 1, torch.ones(4)])


@pytest.mark.parametrize("fuse", [(), FUSE], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"hidden": 24, "ffn": 20, "bias": True, "head_dim": 6},
        {"experts": 4, "expert_bias": True},
        {"windows": (5, 0), "sinks": True},
        {"kv_sources": (0, 0)},
    ],
    ids=["llama", "biases", "experts", "windows", "shared"],
)
def test_the_function_stays(toy, shape, fuse):
    program = run(toy(**shape), *fuse)
    exact = logits(program)
    done = run(program, Rotate())
    assert distance(done, exact) < 1e-5
    assert done.history[-1].matches == 5 + 2
    assert done.num_nodes == program.num_nodes


def test_only_values_or_only_the_stream(toy):
    program = toy(tied=True)
    exact = logits(program)
    values = run(program, Rotate(stream=False))
    assert distance(values, exact) < 1e-5
    assert torch.equal(values.weights.evaluate("embed.weight"), program.weights.evaluate("embed.weight"))
    stream = run(program, Rotate(values=False, untie=True))
    assert distance(stream, exact) < 1e-5
    assert stream.weights.evaluate("norm.weight").tolist() == [1.0] * 32
    assert "embed.weight.head" in set(stream.used_weights())


def test_outliers_behind_norms_are_spread(toy):
    program = run(toy(hidden=64, ffn=96), *FUSE)
    changed = {}
    for name in program.used_weights():
        if "norm" in name and name.startswith("layers"):
            gain = program.weights.evaluate(name).clone()
            gain[::16] *= 30
            changed[name] = Constant(gain)
    program = program.replace(weights=program.weights.with_entries(changed))
    exact = logits(program)
    rounded = Rtn(bits=4, group_size=0, head_bits=8)
    plain = float((logits(run(program, rounded)) - exact).pow(2).mean())
    turned = float((logits(run(program, Rotate(), rounded)) - exact).pow(2).mean())
    assert turned < 0.8 * plain


def test_what_does_not_admit_it_is_refused_with_the_reason(toy):
    with pytest.raises(RecipeError, match=r"embed\.weight.*untie=true"):
        run(toy(tied=True), Rotate())
    with pytest.raises(RecipeError, match="layer_norm") as caught:
        run(toy(norm="layer_norm"), Rotate())
    assert "rotate.stream=false" in str(caught.value)
    with pytest.raises(RecipeError, match=r"quantized_embedding|No RMS norm reads"):
        run(toy(), Rtn(), Rotate(values=False))
    with pytest.raises(RecipeError, match="quantized_linear"):
        run(toy(), Rtn(), Rotate(stream=False))


def test_an_override_puts_it_before_what_rounds():
    recipe = override(preset_recipe("int4"), ["rotate.stream=false", "rotate.seed=3"])
    names = [pass_.name for pass_ in recipe.passes]
    assert names.index("keep_codes") < names.index("rotate") < names.index("gptq")
    assert Rotate(stream=False, seed=3) in recipe.passes
    with pytest.raises(RecipeError, match="does not have pass 'rtn'"):
        override(preset_recipe("int4"), ["rtn.bits=4"])
