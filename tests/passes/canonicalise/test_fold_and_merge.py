"""What depends on weights alone is computed at compile time, what is computed twice once, the rest erased."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmc.ir.weights import Cast, Concat, Constant, Permute, Slice, Unbound
from llmc.passes.dead_code import DeadCode
from llmc.passes.fold_constants import FoldConstants
from llmc.passes.merge_common import MergeCommon
from llmc.passes.rewrite import operator_of

WIDTH = 8


class Sketch(nn.Module):
    """Embeds to `x[T, 8]`, multiplies by the matrix `body` makes of the parameters, projects wanted rows."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.b = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("damping", torch.tensor(0.5), persistent=False)
        self.head = nn.Linear(WIDTH, 16)
        self.body = body

    def forward(self, input_ids, positions, out_rows):
        x = nn.functional.embedding(input_ids, self.table)
        return self.head((x @ self.body(self, x))[out_rows])


def kind(program):
    (product,) = [node for node in program.graph.nodes if operator_of(node) == "matmul"]
    assert product.args[1].op == "get_attr"
    return program.weights[str(product.args[1].target)]


def unbind(program):
    """The program with its weights known by shape alone."""
    entries = {name: program.weights[name] for name in program.weights}
    return program.replace(
        weights=program.weights.with_entries(
            {name: Unbound(name, expr.shape, expr.dtype) for name, expr in entries.items()}
        )
    )


LAZY = {
    "transpose": (lambda m, x: m.a.transpose(0, 1), Permute),
    "join": (lambda m, x: torch.cat([m.a[:, :3], m.b[:, 3:]], 1), Concat),
    "slice": (lambda m, x: torch.cat([m.a, m.b], 0)[WIDTH:], Slice),
    "a part": (lambda m, x: torch.cat([m.a, m.b], 0).chunk(2, 0)[1], Slice),
    "cast": (lambda m, x: m.a.to(torch.bfloat16).float(), Cast),
}


@pytest.mark.parametrize("name", LAZY)
def test_rearranged_weights_are_lazy_whether_bound_or_not(name, export, apply, closeness):
    body, expected = LAZY[name]
    traced = export(Sketch(body))
    folded = apply(traced, FoldConstants())
    assert type(kind(folded)) is expected
    assert closeness(traced, folded) <= 1e-6
    assert type(kind(apply(unbind(traced), FoldConstants()))) is expected


def test_transposed_twice_is_the_weight_itself(export, apply):
    traced = export(Sketch(lambda m, x: m.a.transpose(0, 1).exp().log().transpose(0, 1)))
    twice = apply(export(Sketch(lambda m, x: m.a.permute(1, 0).transpose(0, 1))), FoldConstants())
    assert "a" in twice.weights
    assert set(twice.weights) == {"table", "a", "head.weight", "head.bias"}
    assert traced.num_nodes > twice.num_nodes


def test_small_arithmetic_is_done_now(export, apply, closeness):
    traced = export(Sketch(lambda m, x: (m.a + m.b) * 2))
    folded = apply(traced, FoldConstants())
    assert isinstance(kind(folded), Constant)
    assert closeness(traced, folded) == 0


def test_arithmetic_beyond_the_limit_waits_with_a_reason(export, apply):
    folded = apply(export(Sketch(lambda m, x: m.a + m.b)), FoldConstants(limit_bytes=100))
    assert folded.history[-1].misses == ("add: larger than limit_bytes (256 bytes)",)
    assert "add" in [operator_of(node) for node in folded.graph.nodes]


def test_arithmetic_on_weights_without_values_waits_with_a_reason(export, apply):
    folded = apply(unbind(export(Sketch(lambda m, x: m.a + m.b))), FoldConstants())
    assert folded.history[-1].misses == ("add: computed from weights that are not bound yet",)


def test_a_constant_without_dimensions_becomes_a_number(export, apply, closeness):
    traced = export(Sketch(lambda m, x: (x * m.damping).transpose(0, 1) @ x))
    folded = apply(traced, FoldConstants())
    (product,) = [node for node in folded.graph.nodes if operator_of(node) == "mul"]
    assert product.args[1] == 0.5
    assert closeness(traced, folded) == 0


def test_equal_calls_are_made_once(export, apply, closeness):
    def body(m, x):
        return x.tanh().sum() * m.a + x.tanh().sum() * m.a + x.mul(1).sum() * m.b + x.mul(1.0).sum() * m.b

    traced = export(Sketch(body))
    merged = apply(traced, MergeCommon())
    names = [operator_of(node) for node in merged.graph.nodes]
    assert names.count("tanh") == 1
    assert names.count("sum") == 3  # 1 and 1.0 are told apart
    assert closeness(traced, merged) == 0


def test_dead_code_goes_with_its_weights(export, apply):
    traced = export(Sketch(lambda m, x: m.a))
    graph = traced.copy_graph()
    reader = next(node for node in graph.nodes if node.target == "a")
    with graph.inserting_after(reader):
        graph.call_function(torch.ops.aten.exp.default, (reader,))
    padded = traced.replace(graph=graph)
    cleaned = apply(padded, DeadCode())
    assert cleaned.num_nodes == traced.num_nodes
    assert cleaned.history[-1].matches == 1
