"""Fusions: what the graph looks like after each, that numbers stay, and why near-misses are left alone."""

from __future__ import annotations

import pytest
import torch

from llmc.ir.infer import infer
from llmc.ir.weights import Concat, Constant
from llmc.passes.base import PassContext
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_gate_up import FuseGateUp
from llmc.passes.fuse_linears import joined_name
from llmc.passes.fuse_qkv import FuseQkv
from llmc.passes.graph import argument, calls
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes

ops = torch.ops.llmc
aten = torch.ops.aten
CONTEXT = PassContext()


def run(program, *passes):
    """Run under verification and the numeric contract, and infer the result again from nothing."""
    done = run_passes(program, passes, CONTEXT, [Verification(), NumericContract()])
    again = done.replace(graph=done.copy_graph())
    for node in again.graph.nodes:
        node.meta.clear()
    infer(again)
    for one, other in zip(done.graph.nodes, again.graph.nodes, strict=True):
        assert describe(one.meta.get("val")) == describe(other.meta.get("val")), one
    return done


def describe(value):
    if isinstance(value, tuple | list):
        return tuple(describe(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return None
    return value.dtype, [dim if isinstance(dim, int) else "T" for dim in value.shape]


def count(program, operator):
    return len(calls(program.graph, operator))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qkv_becomes_one_linear_and_three_slices(toy, bias, dtype):
    before = toy(bias=bias, dtype=dtype)
    done = run(before, FuseQkv(expect=2))
    assert count(before, ops.linear.default) - count(done, ops.linear.default) == 4
    assert isinstance(done.weights["layers.1.attn.q+k+v.weight"], Concat)
    assert done.weights["layers.1.attn.q+k+v.weight"].shape == (64, 32)
    assert ("layers.1.attn.q+k+v.bias" in done.weights) == bias
    assert "layers.1.attn.q.weight" not in done.weights
    cuts = [(argument(node, "start"), argument(node, "end")) for node in calls(done.graph, aten.slice.Tensor)]
    assert sorted(cuts) == sorted([(0, 32), (32, 48), (48, 64)] * 2)
    assert done.history[0].matches == 2


def test_qkv_gives_zero_bias_to_those_without(toy):
    program = toy(bias=True)
    graph = program.copy_graph()
    k = next(node for node in calls(graph, ops.linear.default) if "attn.k" in node.args[1].target)
    bias = k.args[2]
    k.update_arg(2, None)
    graph.erase_node(bias)
    done = run(program.replace(graph=graph), FuseQkv(expect=2))
    fused = next(name for name in done.weights if name.endswith("0.attn.q+k+v.bias"))
    assert torch.equal(done.weights.evaluate(fused)[32:48], torch.zeros(16))


def test_a_layer_that_reads_another_cache_keeps_its_query_alone(toy):
    done = run(toy(kv_sources=(0, 0)), FuseQkv(expect=1))
    assert "layers.1.attn.q.weight" in done.weights
    assert done.history[0].misses == ("attention_1: no two projections share an input",)


def test_a_shared_weight_is_a_miss_with_a_reason(toy):
    program = toy()
    graph = program.copy_graph()
    linears = {node.args[1].target: node for node in calls(graph, ops.linear.default)}
    linears["layers.0.attn.v.weight"].update_arg(1, linears["layers.0.attn.k.weight"].args[1])
    shared = run(program.replace(graph=without_dead(graph)), FuseQkv())
    assert shared.history[0].matches == 1
    assert "its weight 'layers.0.attn.k.weight' is read elsewhere too" in shared.history[0].misses[0]


def without_dead(graph):
    graph.eliminate_dead_code()
    return graph


@pytest.mark.parametrize("up_first", [False, True])
def test_gate_and_up_become_one_product(toy, up_first):
    done = run(toy(up_first=up_first, bias=True), FuseGateUp(expect=2))
    assert count(done, ops.gated_activation.default) == 0
    assert count(done, ops.gated_activation_packed.default) == 2
    weight = done.weights["layers.0.mlp.gate+up.weight"]
    assert weight.shape == (96, 32)


@pytest.mark.parametrize(("gate", "up"), [(0, 48), (48, 0)])
def test_halves_of_one_product_lose_their_slices(toy, gate, up):
    program = run(sliced_gate_up(toy(bias=True), gate, up), FuseGateUp(expect=2))
    assert count(program, aten.slice.Tensor) == 0
    names = [name for name in program.weights if name.endswith("gate_first")]
    assert len(names) == (0 if gate == 0 else 4)


def sliced_gate_up(program, gate, up):
    """Each gated activation reads slices of one linear over joined weights."""
    graph = program.copy_graph()
    added = {}
    for node in calls(graph, ops.gated_activation.default):
        first, second = (node.args[0], node.args[1]) if gate == 0 else (node.args[1], node.args[0])
        with graph.inserting_before(node):
            read = []
            for index, part in ((1, "weight"), (2, "bias")):
                name = f"{node.name}.both.{part}"
                added[name] = Concat(
                    tuple(program.weights[source.args[index].target] for source in (first, second)), 0
                )
                read.append(graph.get_attr(name))
            both = graph.call_function(ops.linear.default, (first.args[0], *read))
            halves = [
                graph.call_function(aten.slice.Tensor, (both, 1, start, start + 48)) for start in (gate, up)
            ]
        node.update_arg(0, halves[0])
        node.update_arg(1, halves[1])
    return program.replace(graph=without_dead(graph), weights=program.weights.with_entries(added))


def test_gate_and_up_of_different_inputs_stay_apart(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    gated = calls(graph, ops.gated_activation.default)[0]
    other = calls(graph, ops.rms_norm.default)[0]
    gated.args[1].update_arg(0, other)
    done = run(program.replace(graph=graph), FuseGateUp())
    assert done.history[0].misses == ("gated_activation: its gate and up read different inputs",)


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additions_join_their_norms_bit_for_bit(toy, norm, dtype):
    done = run(toy(norm=norm, dtype=dtype), FuseAddNorm(expect=4))
    assert count(done, aten.add.Tensor) == 0
    assert count(done, getattr(ops, norm).default) == 1  # the first, which normalises the embeddings
    assert done.history[0].divergence == 0.0


def test_the_second_norm_of_a_sum_reads_the_sum(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    last = calls(graph, ops.rms_norm.default)[-1]
    with graph.inserting_after(last):
        second = graph.call_function(ops.rms_norm.default, (last.args[0], None, 1e-5, 0.0, "cast_then_scale"))
    with graph.inserting_after(second):
        mixed = graph.call_function(aten.add.Tensor, (last, second))
    last.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    done = run(program.replace(graph=graph), FuseAddNorm())
    assert done.history[0].matches == 2
    assert count(done, ops.rms_norm.default) == 2


def test_a_sum_with_a_factor_is_a_miss(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    node = calls(graph, aten.add.Tensor)[0]
    node.kwargs = {"alpha": 0.5}
    done = run(program.replace(graph=graph), FuseAddNorm())
    assert done.history[0].matches == 1
    assert done.history[0].misses == ("rms_norm_1: its sum has a constant or a factor",)


def test_all_fusions_follow_one_another(toy):
    done = run(toy(bias=True), FuseQkv(), FuseGateUp(), FuseAddNorm())
    assert [record.matches for record in done.history] == [2, 2, 4]
    assert count(done, ops.linear.default) == 2 * 4 + 1


def test_the_down_projections_of_latent_attention_are_joined(toy):
    """q and k, v come from narrow linears of one input, through norms and wide linears of their own."""
    program = toy(num_layers=1)
    graph = program.copy_graph()
    added = {}
    for index, node in enumerate(calls(graph, ops.linear.default)[:3]):
        with graph.inserting_before(node):
            added[f"a{index}.weight"] = Constant(torch.randn(32, 32))
            weight = graph.get_attr(f"a{index}.weight")
            down = graph.call_function(ops.linear.default, (node.args[0], weight, None))
            norm = graph.call_function(ops.rms_norm.default, (down, None, 1e-5, 0.0, "cast_then_scale"))
        node.update_arg(0, norm)
    changed = program.replace(graph=graph, weights=program.weights.with_entries(added))
    done = run(changed, FuseQkv(expect=1))
    assert "a0+a1+a2.weight" in done.weights
    assert count(done, ops.linear.default) == count(program, ops.linear.default) + 1


def test_joined_names_are_readable():
    assert joined_name(["m.0.q.weight", "m.0.k.weight"]) == "m.0.q+k.weight"
    assert joined_name(["m.0.a.q.weight", "m.0.b.weight"]) == "m.0.a.q+b.weight"
    assert joined_name(["q.weight", "k.weight"]) == "q+k.weight"
