"""What a decoded token costs beside matrix products: nodes of an ONNX graph that attention takes over."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from llmc.codegen.onnx.graph import StoredTensor
from llmc.codegen.onnx.lowered import Export, lower
from llmc.codegen.onnx.stored import StoredWeights
from llmc.passes.quantize.rtn import Rtn

INT4 = Rtn(bits=4, group_size=32, head_bits=4)


def model_of(program, **options):
    """The model of `program`, its weights one behind the other in a file that there is not."""
    places, offset = {}, 0
    for name in program.weights:
        expr = program.weights[name]
        length = math.prod(expr.shape) * expr.dtype.itemsize
        places[name] = StoredTensor("weights", offset, length)
        offset += length
    return lower(program, StoredWeights(program.weights, places), Export(**options), {})


def graph_of(program, **options):
    """The nodes of `program`'s graph."""
    return list(model_of(program, **options).graph)


def attentions(nodes):
    return [node for node in nodes if node.op_type == "GroupQueryAttention"]


def in_layers(nodes):
    """How often each operator is within layers."""
    return Counter(node.op_type for node in nodes if "/layers/" in node.name)


def test_a_layer_is_its_products_and_little_else(portable_program):
    program = portable_program("qwen2-swa", INT4)
    nodes = graph_of(program)
    layers = len(program.spec.attention)
    assert in_layers(nodes) == {
        "MatMulNBits": 5 * layers, "GroupQueryAttention": layers, "QuickGelu": layers, "Mul": layers,
        "SkipSimplifiedLayerNormalization": 2 * layers - 1, "RMSNormalization": 1,
        # Behind the last attention: wanted rows of what it gives and of the residual stream.
        "GatherND": 2,
    }  # fmt: skip
    assert Counter(node.op_type for node in nodes if node.name.startswith("/batch/")) == {
        "ReduceSum": 1, "Sub": 2, "Cast": 2, "Shape": 2, "Squeeze": 1, "Min": 1, "Unsqueeze": 1,
    }  # fmt: skip
    for node in attentions(nodes):
        assert node.inputs[0].producer().op_type == "MatMulNBits"
        assert list(node.inputs[1:3]) == [None, None]
        assert node.attributes["do_rotary"].as_int() == 1


@pytest.mark.parametrize("logits", ["last", "rows", "all"])
def test_behind_the_last_attention_only_wanted_rows_are_computed(logits, portable_program):
    nodes = graph_of(portable_program("qwen2-swa", INT4), logits=logits)
    gathers = [node for node in nodes if node.op_type == ("GatherND" if logits == "last" else "Gather")]
    names = {value.name for node in gathers for value in node.outputs}
    (last,) = attentions(nodes)[-1:]
    products = [node for node in nodes[nodes.index(last) :] if node.op_type == "MatMulNBits"]
    assert len(products) == 5  # of attention's output, of gate, of up, of down, the head
    gathered = products[0].inputs[0].name in names
    assert gathered == (logits != "all")
    assert len(gathers) == (2 if gathered else 0)


def test_normed_queries_and_keys_are_rotated_by_attention_and_not_packed(portable_program):
    nodes = graph_of(portable_program("qwen3", INT4))
    assert "RotaryEmbedding" not in {node.op_type for node in nodes}
    for node in attentions(nodes):
        assert None not in node.inputs[:3]
        assert node.attributes["do_rotary"].as_int() == 1


@pytest.mark.parametrize("name", ["deepseek_v3", "cohere"])
def test_a_rotation_that_attention_has_not_stays_an_operator(name, portable_program):
    program = portable_program(name)
    nodes = graph_of(program)
    styles = {node.args[4] for node in program.graph.nodes if str(node.target) == "llmc.rope.default"}
    if styles == {"interleaved"}:
        assert {node.attributes["rotary_interleaved"].as_int() for node in attentions(nodes)} == {1}
        assert "RotaryEmbedding" not in {node.op_type for node in nodes}
    else:
        assert "RotaryEmbedding" in {node.op_type for node in nodes}
        assert not any("do_rotary" in node.attributes for node in attentions(nodes))


def test_angles_of_a_very_long_context_are_computed_in_each_step(portable_program):
    program = portable_program("llama", INT4)
    longer = program.replace(spec=replace(program.spec, max_context=2**26))
    nodes = graph_of(longer)
    assert "RotaryEmbedding" in {node.op_type for node in nodes}
    assert not any("do_rotary" in node.attributes for node in attentions(nodes))
    # Packing needs queries and keys as the product gave them.
    assert all(None not in node.inputs[:3] for node in attentions(nodes))


@pytest.mark.parametrize("logits", ["last", "rows", "all"])
def test_logits_leave_the_head_as_they_are_given_out(logits, portable_program):
    """A reshape in front of an output copies them."""
    model = model_of(portable_program("qwen2-swa", INT4), logits=logits)
    assert model.graph.outputs[0].producer().op_type == "MatMulNBits"


def test_gate_and_up_are_products_over_halves_of_what_is_stored(portable_program):
    nodes = graph_of(portable_program("qwen2-swa", INT4))
    for product in (node for node in nodes if node.op_type == "Mul" and "/mlp/" in node.name):
        gate, up = product.inputs[0].producer().inputs[0].producer(), product.inputs[1].producer()
        assert gate.inputs[0] is up.inputs[0]
        for pair in zip(gate.inputs[1:3], up.inputs[1:3], strict=True):
            first, second = (each.const_value or each.producer().inputs[0].const_value for each in pair)
            assert second.offset == first.offset + first.length
