"""Mixtures of experts in ONNX: what QMoE computes and what it is not given, and that codes come back."""

from __future__ import annotations

import operator

import onnx
import pytest
import torch
from torch import fx

from llmc.codegen.onnx.forms import portable_entries, stored_forms, stored_store
from llmc.codegen.onnx.mixtures import is_non_negative, misfit
from llmc.passes.graph import calls
from llmc.passes.quantize.replace import QUANTIZED_MOE
from llmc.passes.quantize.rtn import Rtn

INT4 = {"bits": 4, "group_size": 32}
SCHEMES = {
    "groups": INT4,
    "zeros": {**INT4, "symmetric": False},
    "rows": {"bits": 4, "group_size": 0},
    "bytes": {"bits": 8, "group_size": 32},
}


@pytest.fixture(scope="module")
def quantised(portable_program):
    """`quantised(family, scheme)`: the family's program with experts rounded as `SCHEMES` says."""
    return lambda family, scheme: portable_program(family, Rtn(**SCHEMES[scheme]))


def operators(path):
    """How often each operator is in the graph at `path`, subgraphs left out."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return {kind: [node.op_type for node in nodes].count(kind) for kind in ("QMoE", "Loop")}


@pytest.mark.parametrize(
    ("family", "scheme", "kind"),
    [
        ("qwen3_moe", "groups", "QMoE"),
        ("qwen3_moe", "zeros", "Loop"),
        ("gpt_oss", "zeros", "QMoE"),
        pytest.param("qwen3_moe", "rows", "QMoE", marks=pytest.mark.slow),
        ("qwen3_moe", "bytes", "Loop"),
        ("gpt_oss", "groups", "QMoE"),
        pytest.param("mixtral", "zeros", "QMoE", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "groups", "QMoE", marks=pytest.mark.slow),
        pytest.param("phimoe", "groups", "QMoE", marks=pytest.mark.slow),
        pytest.param("granitemoe", "groups", "QMoE", marks=pytest.mark.slow),
        pytest.param("ernie4_5_moe", "groups", "QMoE", marks=pytest.mark.slow),
    ],
)
def test_quantised_experts_compute_what_the_program_says(
    family, scheme, kind, quantised, relative_error, tmp_path
):
    program = quantised(family, scheme)
    assert relative_error(program, tmp_path) <= 1e-5
    found = operators(tmp_path / "model.onnx")
    assert found[kind] == len(list(calls(program.graph, QUANTIZED_MOE))) > 0
    assert sum(found.values()) == found[kind]


@pytest.mark.parametrize("scheme", ["zeros", "bytes"])
def test_quantised_experts_in_standard_operators_alone(scheme, quantised, relative_error, tmp_path):
    program = quantised("gpt_oss", scheme)
    assert relative_error(program, tmp_path, contrib=False) <= 1e-5
    assert operators(tmp_path / "model.onnx")["QMoE"] == 0


@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_stored_experts_come_back_as_they_were(scheme, contrib, quantised):
    program = quantised("qwen3_moe", scheme)
    forms = stored_forms(program, contrib)
    stored = stored_store(program.weights, forms)
    back = portable_entries({name: stored[name] for name in stored}, forms)
    is_changed = False
    for name in program.weights:
        before = program.weights.evaluate(name)
        after = back[name].evaluate(program.weights.reader)
        assert after.dtype == before.dtype == back[name].dtype
        assert torch.equal(after, before)
        is_changed |= not torch.equal(
            stored.evaluate(name).view(torch.uint8), before.contiguous().view(torch.uint8)
        )
    assert is_changed == (contrib or scheme in ("groups", "rows"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "gelu"}, "no activation gelu"),
        ({"activation_scheme": "int8_g32"}, "inputs are rounded"),
        ({"down_scheme": "int4_g16"}, "one group size"),
        ({"down_scheme": "int8_g32"}, "8-bit experts"),
    ],
)
def test_a_mixture_that_the_operator_would_change_is_not_given_to_it(change, reason, quantised):
    graph = quantised("gpt_oss", "groups").copy_graph()
    node = next(iter(calls(graph, QUANTIZED_MOE)))
    assert misfit(node) == ""
    names = [entry.name for entry in node.target._schema.arguments]
    values = dict(zip(names, node.args, strict=False)) | change
    node.args = tuple(values.get(name, "") for name in names)
    assert reason in misfit(node)


def test_shares_are_known_to_be_positive_by_what_made_them():
    graph = fx.Graph()
    logits = graph.placeholder("logits")
    aten = torch.ops.aten
    shares = graph.call_function(aten.softmax.int, (logits, -1))
    top = graph.call_function(aten.topk.default, (shares, 2))
    values = graph.call_function(operator.getitem, (top, 0))
    total = graph.call_function(aten.sum.dim_IntList, (values, [-1], True))
    scaled = graph.call_function(
        aten.mul.Tensor, (graph.call_function(aten.div.Tensor, (values, total)), 2.5)
    )
    assert is_non_negative(scaled)
    assert is_non_negative(graph.call_function(aten.clamp.default, (logits, 1e-12)))
    assert not is_non_negative(graph.call_function(aten.clamp.default, (logits, -1.0)))
    assert not is_non_negative(graph.call_function(aten.mul.Tensor, (scaled, -1.0)))
    assert not is_non_negative(graph.call_function(aten.mul.Tensor, (scaled, logits)))
    assert not is_non_negative(graph.call_function(aten.topk.default, (logits, 2)))
