"""Ten bugs planted in passes, and more inside of solvers, one at a time: bisection names the pass and the
node it spoilt."""

from __future__ import annotations

import json

import pytest
import torch

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.bisect import bisect_passes
from llmc.compiler.bisect_data import probe_calibration
from llmc.compiler.bisect_model import bisect_model
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.ir.weights import Constant
from llmc.passes.base import PassContext
from llmc.passes.graph import argument, calls, set_argument
from llmc.passes.pipeline import canonicalise, fuse, layout, plan
from llmc.passes.quantize import solve
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.recipes import preset_recipe
from llmc.spec.errors import UsageError

OPS = torch.ops.llmc


@pytest.fixture(scope="module")
def traced(stories_1m):
    checkpoint = open_checkpoint(stories_1m)
    return bind_checkpoint(trace_config(checkpoint.config, dtype=torch.float32), checkpoint)


INT4 = (*canonicalise(), *fuse(), Rtn(bits=4, expect=1), *layout(), *plan())


def plant(monkeypatch, name, spoil):
    """Let the pass `name` have its result spoilt by `spoil(graph, weights)`, which gives the node it spoils
    and changed weights. Returns a list that gets the node's name."""
    kind = next(type(pass_) for pass_ in INT4 if pass_.name == name)
    inner, nodes = kind.run, []

    def run(self, program, context):
        result = inner(self, program, context)
        done = result.program
        graph = done.copy_graph()
        node, weights = spoil(graph, done.weights)
        nodes.append(node)
        spoilt = done.replace(graph=graph, weights=done.weights.with_entries(weights))
        return type(result)(program=spoilt, report=result.report)

    monkeypatch.setattr(kind, "run", run)
    return nodes


def last(graph, operator):
    return calls(graph, operator)[-1]


def wrong_rope_style(graph, weights):
    node = last(graph, OPS.rope.default)
    style = argument(node, "style")
    set_argument(node, "style", "interleaved" if style == "half" else "half")
    return node.name, {}


def swapped_gate(graph, weights):
    node = last(graph, OPS.gated_activation.default)
    gate, up = argument(node, "gate"), argument(node, "up")
    set_argument(node, "gate", up)
    set_argument(node, "up", gate)
    return node.name, {}


def dropped_residual(graph, weights):
    node = last(graph, OPS.add_rms_norm.default)
    zero = graph.create_node("call_function", torch.ops.aten.mul.Tensor, (node.args[0], 0.0))
    node.prepend(zero)
    node.update_arg(0, zero)
    return node.name, {}


def changed_scales(change):
    def spoil(graph, weights):
        node = calls(graph, OPS.quantized_linear.default)[2]
        name = str(argument(node, "scales").target)
        return node.name, {name: Constant(change(weights.evaluate(name)).contiguous())}

    return spoil


def swapped_keys_and_queries(graph, weights):
    name = next(str(n.target) for n in graph.nodes if n.op == "get_attr" and "q_proj+k_proj" in str(n.target))
    value = weights.evaluate(name)
    product = next(n for n in calls(graph, OPS.linear.default) if argument(n, "weight").target == name)
    return product.name, {name: Constant(value.roll(64, 0))}


def smaller_epsilon(graph, weights):
    node = last(graph, OPS.rms_norm.default)
    set_argument(node, "eps", 1.0)
    return node.name, {}


def another_scale_of_attention(graph, weights):
    node = last(graph, OPS.paged_attention.default)
    set_argument(node, "scale", 0.2)
    return node.name, {}


def narrower_window(graph, weights):
    node = last(graph, OPS.paged_attention.default)
    set_argument(node, "window", 4)
    return node.name, {}


def doubled_constant(graph, weights):
    name = next(str(n.target) for n in graph.nodes if n.op == "get_attr" and "inv_freq" in str(n.target))
    (reader,) = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
    return next(iter(reader.users)).name, {name: Constant(weights.evaluate(name) * 2)}


PLANTS = [
    ("rope", wrong_rope_style),
    ("gated_activation", swapped_gate),
    ("fuse_add_norm", dropped_residual),
    ("rtn", changed_scales(lambda scales: scales.roll(1, 1))),  # every group has its neighbour's scale
    ("rtn", changed_scales(lambda scales: scales.T.reshape(scales.shape))),
    ("fuse_qkv", swapped_keys_and_queries),
    ("name_norms", smaller_epsilon),
    ("paged_attention", another_scale_of_attention),
    ("fuse_rope_cache", narrower_window),
    ("drop_batch", doubled_constant),
]


NAMES = [
    "wrong_rope_style",
    "swapped_gate",
    "dropped_residual",
    "off_by_one_group",
    "transposed_scale",
    "swapped_keys_and_queries",
    "another_epsilon",
    "another_scale_of_attention",
    "narrower_window",
    "doubled_constant",
]


@pytest.mark.parametrize(("name", "spoil"), PLANTS, ids=NAMES)
def test_a_planted_bug_is_named(traced, monkeypatch, name, spoil):
    nodes = plant(monkeypatch, name, spoil)
    verdict = bisect_passes(traced, INT4, PassContext())
    assert verdict.pass_name == name
    assert verdict.suspect is not None
    assert verdict.suspect.node == nodes[0]


def spoil_solver(monkeypatch, change):
    """Let the solver of calibrated linears give the last weight of layer 1, which keeps to 4 bits in groups,
    other scales, by `change`."""
    sound, spoilt = solve.solve_linears, "model.layers.1.mlp.down_proj.weight"

    def solve_linears(*arguments):
        results = sound(*arguments)
        if spoilt in results:
            tensor = results[spoilt].tensor
            scales = change(tensor.scales).contiguous()
            results[spoilt] = results[spoilt]._replace(tensor=tensor._replace(scales=scales))
        return results

    monkeypatch.setattr(solve, "solve_linears", solve_linears)
    return spoilt


SOLVER_BUGS = {
    "transposed_scale": lambda scales: scales.T.reshape(scales.shape),
    "off_by_one_group": lambda scales: scales.roll(1, 1),
    "off_by_one_row": lambda scales: scales.roll(1, 0),
}


@pytest.mark.parametrize("name", SOLVER_BUGS)
def test_a_bug_inside_of_a_solver_is_named(traced, monkeypatch, name):
    weight = spoil_solver(monkeypatch, SOLVER_BUGS[name])
    with probe_calibration(PassContext(), traced.spec) as context:
        verdict = bisect_passes(traced, preset_recipe("int4").passes, context)
    assert verdict.pass_name == "gptq"
    node = next(node for node in verdict.after.graph.nodes if node.name == verdict.suspect.node)
    assert argument(node, "codes").target == f"{weight}.codes"
    assert verdict.suspect.layer == "layers.1"


@pytest.mark.parametrize("preset", ["int4", pytest.param("int4-max", marks=pytest.mark.slow)])
def test_a_sound_solver_is_clean(traced, preset):
    with probe_calibration(PassContext(), traced.spec) as context:
        verdict = bisect_passes(traced, preset_recipe(preset).passes, context)
    assert verdict.is_clean


def test_the_reproducer_of_a_solvers_bug_solves_again(stories_1m, tmp_path, monkeypatch):
    spoil_solver(monkeypatch, SOLVER_BUGS["off_by_one_group"])
    found = bisect_model(stories_1m, quant="int4", output=tmp_path / "bug")
    assert found.verdict.pass_name == "gptq"
    assert found.reproducer.reproduces


def test_a_sound_pipeline_is_clean_in_few_runs(traced):
    passes = INT4
    verdict = bisect_passes(traced, passes, PassContext())
    assert verdict.is_clean
    assert verdict.runs <= 4 < len(passes)


def test_halving_runs_a_fraction_of_the_programs(traced, monkeypatch):
    plant(monkeypatch, "gated_activation", swapped_gate)
    verdict = bisect_passes(traced, preset_recipe("none").passes, PassContext())
    assert verdict.pass_name == "gated_activation"
    assert verdict.runs <= 7


def test_the_reproducer_shows_the_same_pass_on_a_small_model(stories_1m, tmp_path, monkeypatch):
    plant(monkeypatch, "fuse_qkv", swapped_keys_and_queries)
    found = bisect_model(stories_1m, quant="int8", output=tmp_path / "bug")
    assert found.verdict.pass_name == "fuse_qkv"
    assert found.reproducer.reproduces
    told = json.loads((tmp_path / "bug" / "verdict.json").read_text())
    assert told["pass"] == "fuse_qkv"
    small = tmp_path / "bug" / "model" / "model.safetensors"
    assert small.stat().st_size < 1 << 20
    again = bisect_model(tmp_path / "bug" / "model", recipe=tmp_path / "bug" / "recipe.yaml")
    assert again.verdict.pass_name == "fuse_qkv"
    with pytest.raises(UsageError, match="cannot be written"):
        bisect_model(stories_1m, quant="int8", output=tmp_path / "bug")


def test_a_preset_and_a_recipe_are_one_too_many(stories_1m, tmp_path):
    with pytest.raises(UsageError, match="Both a preset and a recipe"):
        bisect_model(stories_1m, quant="int8", recipe=tmp_path / "recipe.yaml")
