"""Bugs planted in one layer of an ONNX artifact's graph: the trace names the node, and blames no pass."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from llmc.artifact.reader import open_artifact
from llmc.cli.main import main
from llmc.codegen.onnx import backend
from llmc.codegen.onnx.options import OnnxOptions
from llmc.codegen.onnx.taps import GraphOperator, graph_taps
from llmc.compiler import finish, onnx_trace
from llmc.compiler.compare.quality import portable_program, stored_program
from llmc.compiler.driver import compile_model
from llmc.compiler.layer_trace import trace_layers
from llmc.spec.errors import ArtifactError, CheckFailed

PROMPTS = [tuple(range(5, 75)), (9, 8, 7)]


def compiled(model, output, overrides=()):
    compile_model(
        model,
        output=output,
        quant="int8",
        target="onnx",
        verify="off",
        cache=False,
        overrides=list(overrides),
    )
    return open_artifact(output)


def spoil_graphs(monkeypatch, spoil):
    """Let `spoil` change every graph before it is written."""

    def serialize(graph):
        spoil({f"{node.op_type} {node.name}": node for node in graph.graph})
        return serialize_soundly(graph)

    serialize_soundly = backend.serialize
    monkeypatch.setattr(backend, "serialize", serialize)


def spoiled(monkeypatch, model, output, spoil, overrides=()):
    """An artifact whose graphs `spoil` has changed before they were written."""
    spoil_graphs(monkeypatch, spoil)
    # What would refuse to commit such an artifact.
    monkeypatch.setattr(finish, "check_graph", lambda artifact, oracle, judged: None)
    artifact = compiled(model, output, overrides)
    monkeypatch.undo()
    return artifact


def traced(artifact):
    return trace_layers(
        artifact, PROMPTS, reference=portable_program(artifact), reference_name="portable", bound=0.05
    )


@pytest.fixture(scope="module")
def sound(stories_1m, tmp_path_factory):
    return compiled(stories_1m, tmp_path_factory.mktemp("sound") / "a.llmc")


def test_a_sound_graph_is_followed_at_every_node(sound):
    found = traced(sound)
    assert found.first is None
    assert found.code.first is None
    assert found.code.same_as_shipped
    assert "The graph in ONNX Runtime follows the program at every node" in found.verdict()
    lines = {line.node: line for line in found.code.lines}
    assert {"paged_attention_1", "quantized_linear_6", "gated_activation_packed_1", "rms_norm_5"} <= set(
        lines
    )
    assert {"rope_2", "rope_3"} <= set(lines["paged_attention_1"].inside)
    assert "rope_2" not in lines
    assert lines["paged_attention_1"].call.startswith("GroupQueryAttention /model/layers/1/")
    assert found.lines[1].code_error == lines["paged_attention_1"].error


def test_standard_operators_tell_more_nodes(stories_1m, tmp_path):
    found = traced(compiled(stories_1m, tmp_path / "a.llmc", ["onnx.contrib=false"]))
    assert found.code.first is None
    assert {"rope_2", "rope_3", "paged_attention_1"} <= {line.node for line in found.code.lines}
    assert not found.code.difference


def another_layers_scales(nodes):
    first, second = (
        nodes[f"MatMulNBits /model/layers/{layer}/self_attn/o_proj/weight/MatMulNBits"] for layer in (0, 1)
    )
    second.replace_input_with(2, first.inputs[2])


def another_scale_of_scores(nodes):
    node = nodes["GroupQueryAttention /model/layers/1/self_attn/GroupQueryAttention"]
    node.attributes["scale"] = ir.AttrFloat32("scale", 2.0 * node.attributes["scale"].as_float())


def ungated_half(nodes):
    """The gate is activated, and multiplied with itself instead of with its partner."""
    node = nodes["Mul /model/layers/1/mlp/gate_proj+up_proj/weight/Mul"]
    node.replace_input_with(1, node.inputs[0])


def slightly_another_scale(nodes):
    """What rounding to bfloat16, the checkpoint's own precision, would hide."""
    node = nodes["GroupQueryAttention /model/layers/1/self_attn/GroupQueryAttention"]
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.05 * node.attributes["scale"].as_float())


@pytest.mark.parametrize(("spoil", "inputs"), [(slightly_another_scale, "accurate"), (ungated_half, "fast")])
def test_a_graph_with_a_bug_is_refused_and_nothing_is_left(stories_1m, tmp_path, monkeypatch, spoil, inputs):
    spoil_graphs(monkeypatch, spoil)
    with pytest.raises(CheckFailed, match="does not compute what the program says"):
        compiled(stories_1m, tmp_path / "a.llmc", [f"select_kernels.inputs={inputs}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "node", "operator"),
    [
        (another_layers_scales, "quantized_linear_6", "MatMulNBits"),
        (another_scale_of_scores, "paged_attention_1", "GroupQueryAttention"),
        (ungated_half, "gated_activation_packed_1", "Mul"),
    ],
)
def test_a_bug_in_one_layers_graph_is_named_as_the_codes(
    stories_1m, tmp_path, monkeypatch, spoil, node, operator
):
    artifact = spoiled(monkeypatch, stories_1m, tmp_path / "a.llmc", spoil)
    found = traced(artifact)
    assert found.first is None, "no pass is to blame"
    assert found.code.first.node == node
    assert found.code.first.layer == "layers.1"
    assert found.code.first.call.startswith(f"{operator} /model/layers/1/")
    assert found.code.same_as_shipped
    assert f"at node {node}" in found.verdict()
    assert "in engine.onnx" in found.verdict()
    assert found.as_dict()["first_code_node"] == node


def test_the_command_prints_the_nodes_of_a_graph(sound):
    told = CliRunner().invoke(
        main, ["inspect", str(sound.path), "--trace", "--prompt", "Once upon a time", "--json"]
    )
    data = json.loads(told.output)
    assert data["code"]["file"] == "engine.onnx"
    assert data["first_code_node"] is None
    assert all(line["error"] <= line["allowed"] for line in data["code"]["lines"])


def test_logits_that_only_the_whole_graph_gives_are_blamed_on_what_is_fused(sound, monkeypatch):
    run_shipped = onnx_trace._run_shipped
    monkeypatch.setattr(onnx_trace, "_run_shipped", lambda *given: torch.neg(run_shipped(*given)))
    found = traced(sound)
    assert not found.code.same_as_shipped
    assert "2 of their size off" in found.verdict()


def test_a_graph_of_another_program_is_not_traced(sound):
    portable, final = portable_program(sound), stored_program(sound)
    options = OnnxOptions.of(sound.manifest.target)
    with pytest.raises(ArtifactError, match="not what this llmc exports"):
        graph_taps(portable, final, options, [GraphOperator("Gemm", "a", ("b",))])
