"""A program that is as small as one can be and still pass the verifier."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.weights import Constant, WeightStore
from llmc.spec.model import AttentionSpec, ModelSpec

assert ops, "importing it registers the operators"
llmc = torch.ops.llmc


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tensors this small are slower on several threads, far more so on a busy machine."""
    torch.set_num_threads(1)


def build_program() -> Program:
    """Embedding, one attention of one head over it, and a head tied to the table."""
    graph = fx.Graph()
    ids, positions, rows = (graph.placeholder(entry.name) for entry in TRACE_INPUTS)
    table = graph.get_attr("table")
    x = graph.call_function(llmc.embedding.default, (ids, table))
    q = graph.call_function(torch.ops.aten.view.default, (x, [-1, 1, 8]))
    settings = (positions, None, 0, 0, 0.5, 0, 0.0, 0)
    attended = graph.call_function(llmc.attention.default, (q, q, q, *settings))
    flat = graph.call_function(torch.ops.aten.view.default, (attended, [-1, 8]))
    wanted = graph.call_function(llmc.gather_rows.default, (flat, rows))
    graph.output(graph.call_function(llmc.linear.default, (wanted, table, None)))
    weights = WeightStore({"table": Constant(torch.randn(11, 8))}, {"head": "table"})
    attention = AttentionSpec(layer=0, num_heads=1, num_kv_heads=1, qk_dim=8, v_dim=8, scale=0.5, kv_source=0)
    spec = ModelSpec(
        family="tiny",
        architecture="Tiny",
        num_layers=1,
        hidden_size=8,
        vocab_size=11,
        max_context=32,
        compute_dtype="float32",
        tied_head=True,
        num_parameters=88,
        attention=(attention,),
    )
    program = Program(graph=graph, inputs=TRACE_INPUTS, weights=weights, spec=spec)
    infer(program)
    return program


@pytest.fixture
def tiny() -> Program:
    """The smallest program, inferred."""
    return build_program()
