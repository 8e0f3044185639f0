"""Round-to-nearest: which weights get which codes, that nothing else changes, and what they cost."""

from __future__ import annotations

import pytest
import torch

from llmc.ir.interpret import interpret
from llmc.ir.quantized import dequantize_rows
from llmc.ir.weights import Constant
from llmc.passes.base import PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.graph import argument, calls
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.rtn import Rtn
from llmc.spec.errors import RecipeError
from llmc.spec.quant import parse_scheme

ops = torch.ops.llmc


def quantize(program, *before, **options):
    passes = (*before, Rtn(expect=1, **options))
    return run_passes(program, passes, PassContext(), [Verification(), NumericContract()])


def choices(program):
    return {decision.subject: decision.choice for decision in program.history[-1].decisions}


def reasons(program):
    return {decision.subject: decision.reason for decision in program.history[-1].decisions}


def dequantized(program, name, width):
    """The values that the codes of `name` stand for."""
    user = next(
        user
        for node in program.graph.nodes
        if node.op == "get_attr" and node.target == f"{name}.codes"
        for user in node.users
    )
    scheme = parse_scheme(argument(user, "scheme"))
    parts = [program.weights.evaluate(f"{name}.{part}") for part in ("codes", "scales")]
    zeros = program.weights.evaluate(f"{name}.zeros") if f"{name}.zeros" in program.weights else None
    return dequantize_rows(*parts, zeros, scheme, width)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_program_computes_with_the_rounded_weights(toy, bits, group_size, symmetric):
    """The quantised program equals the float one whose weights were rounded beforehand, bit for bit."""
    before = toy(bias=True)
    done = quantize(
        before, bits=bits, group_size=group_size, symmetric=symmetric, head_bits=bits, embedding_bits=bits
    )
    assert not calls(done.graph, ops.linear.default, ops.embedding.default)
    rounded = {
        name: Constant(dequantized(done, name, before.weights[name].shape[1])) for name in choices(done)
    }
    same = before.replace(weights=before.weights.with_entries(rounded))
    sequences = probe_sequences(before.spec, 1)
    assert torch.equal(logits_of(same, sequences), logits_of(done, sequences))
    for name, constant in rounded.items():
        exact = before.weights.evaluate(name)
        size = parse_scheme(choices(done)[name]).group_size or exact.shape[1]
        for start in range(0, exact.shape[1], size):
            group = exact[:, start : start + size]
            span = (
                group.abs().amax(1) * 2
                if symmetric
                else group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)
            )
            step = span / (2**bits - 1 if not symmetric else 2**bits)
            error = (constant.value[:, start : start + size] - group).abs().amax(1)
            assert (error <= step * 1.02 + 1e-6).all()
    assert done.history[-1].divergence > 0


def test_head_and_embedding_have_their_own_bits(toy):
    found = choices(quantize(toy(), bits=4, group_size=32))
    assert found["head.weight"] == found["embed.weight"] == "int8_channel"
    assert found["layers.0.mlp.down.weight"] == "int4_g32"
    assert set(found) == {name for name in toy().weights if name.endswith(".weight") and "norm" not in name}


def test_a_tied_table_is_quantised_once_and_shared(toy):
    done = quantize(toy(tied=True), head_bits=4, embedding_bits=0)
    table = calls(done.graph, ops.quantized_embedding.default)[0]
    head = calls(done.graph, ops.quantized_linear.default)[-1]
    assert argument(table, "codes") is argument(head, "codes")
    assert argument(table, "scales") is argument(head, "scales")
    assert reasons(done)["embed.weight"].startswith("output head and embedding")
    assert not any(name.startswith("embed") for name in done.weights if not name.startswith("embed.weight."))


def test_zero_bits_keep_head_and_embedding(toy):
    done = quantize(toy(), head_bits=0, embedding_bits=0)
    assert {choices(done)[name] for name in ("head.weight", "embed.weight")} == {"kept"}
    assert "head.weight" in done.weights
    assert reasons(done)["head.weight"] == "output head: to be kept"


def test_skipped_and_narrow_weights_are_kept_with_a_reason(toy):
    done = quantize(toy(), skip="layers.0.*, *.down.weight", min_rows=17)
    assert choices(done)["layers.0.attn.q.weight"] == "kept"
    assert reasons(done)["layers.1.mlp.down.weight"] == "it matches skip pattern '*.down.weight'"
    assert reasons(done)["layers.1.attn.k.weight"] == "it has 16 rows, fewer than 17"
    assert done.history[-1].matches == 6


def test_a_skip_pattern_that_matches_nothing_is_an_error(toy):
    with pytest.raises(RecipeError, match=r"'\*.down_proj.weight' matches no weight") as caught:
        quantize(toy(), skip="*.down_proj.weight")
    assert "mlp.down.weight" in caught.value.why


def test_groups_that_do_not_divide_the_width(toy):
    done = quantize(toy(hidden=40, ffn=36, head_dim=10, num_heads=3, num_kv_heads=1), group_size=32)
    assert reasons(done)["layers.0.attn.q.weight"] == "linear; the last group of each row has 8 weights"
    assert reasons(done)["layers.0.attn.o.weight"] == "linear; its 30 inputs are one group"
    assert done.weights["layers.0.attn.q.weight.codes"].shape == (30, 32)
    assert done.weights["layers.0.attn.o.weight.codes"].shape == (40, 15)


def test_fused_weights_are_quantised_as_one(toy):
    done = quantize(toy(), FuseQkv(expect=2), FuseGateUp(expect=2))
    assert choices(done)["layers.0.attn.q+k+v.weight"] == "int4_channel"
    apart = quantize(toy())
    joined = done.weights.evaluate("layers.0.attn.q+k+v.weight.codes")
    parts = [apart.weights.evaluate(f"layers.0.attn.{name}.weight.codes") for name in "qkv"]
    assert torch.equal(joined, torch.cat(parts))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_are_quantised_and_their_router_is_kept(toy, bias, symmetric):
    before = toy(experts=4, expert_bias=bias)
    done = quantize(before, symmetric=symmetric)
    assert choices(done)["layers.0.mlp.router.weight"] == "kept"
    assert len(calls(done.graph, ops.quantized_moe.default)) == 2
    assert not calls(done.graph, ops.moe.default)
    suffix = "" if symmetric else "_asym"
    rounded = {}
    for name, width, scheme in (("gate_up", 32, "int4_channel"), ("down", 48, "int4_g32")):
        for layer in range(2):
            full = f"layers.{layer}.mlp.{name}"
            assert choices(done)[full] == scheme + suffix
            parts = [
                done.weights.evaluate(f"{full}.{part}")
                for part in (("codes", "scales") if symmetric else ("codes", "scales", "zeros"))
            ]
            experts = [
                dequantize_rows(
                    parts[0][expert],
                    parts[1][expert],
                    None if symmetric else parts[2][expert],
                    parse_scheme(scheme + suffix),
                    width,
                )
                for expert in range(4)
            ]
            rounded[full] = Constant(torch.stack(experts))
    node = calls(done.graph, ops.quantized_moe.default)[0]
    plain = calls(before.graph, ops.moe.default)[0]
    x = torch.randn(9, 32)
    chosen, weights = torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    found = call_with(node, done, x, chosen, weights)
    expected = call_with(
        plain, before.replace(weights=before.weights.with_entries(rounded)), x, chosen, weights
    )
    assert torch.equal(found, expected)


def call_with(node, program, *inputs):
    """One mixture of experts on its own, with the weights of its program."""
    rest = [program.weights.evaluate(arg.target) if hasattr(arg, "target") else arg for arg in node.args[3:]]
    return node.target(*inputs, *rest)


def test_both_expert_weights_or_none(toy):
    done = quantize(toy(experts=4), skip="*.gate_up")
    assert reasons(done)["layers.0.mlp.down"] == "the other weight of its experts is kept"
    assert len(calls(done.graph, ops.moe.default)) == 2


def test_a_table_used_as_a_number_is_a_miss(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    head = calls(graph, ops.linear.default)[-1]
    with graph.inserting_before(head):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (head.args[1], 2.0))
    head.update_arg(1, scaled)
    done = quantize(program.replace(graph=graph))
    assert "head.weight: it is read by something other than" in done.history[-1].misses[0]


def test_bits_per_weight_count_everything(toy):
    program = toy(hidden=64, ffn=96, head_dim=16, vocab=128)
    assert bits_per_weight(program) == pytest.approx(32, abs=0.01)
    done = quantize(program, bits=4, group_size=32, head_bits=4, embedding_bits=4)
    quantized = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96) + 2 * 128 * 64
    kept = 5 * 64 + 8
    assert bits_per_weight(done) == pytest.approx((quantized * 4.5 + kept * 32) / (quantized + kept))


def test_quantised_embeddings_keep_the_dtype_of_the_table(toy):
    done = quantize(toy(dtype=torch.bfloat16))
    table = calls(done.graph, ops.quantized_embedding.default)[0]
    assert argument(table, "dtype") == "bfloat16"
    assert table.meta["val"].dtype == torch.bfloat16
    ids = torch.tensor([3, 1])
    inputs = {"input_ids": ids, "positions": torch.arange(2), "out_rows": torch.arange(2)}
    assert interpret(done.graph, inputs, done.weights.evaluate).dtype == torch.bfloat16
