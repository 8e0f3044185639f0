"""The pass alone: a program in, a program out, both verified and their logits compared."""

from __future__ import annotations

import pytest
import torch
from llmc_example_pass.drop_unit_scale import DropUnitScale
from torch import fx

from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.printer import print_program
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.weights import Constant, WeightStore
from llmc.passes.base import PassContext
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.spec.model import ModelSpec

assert ops, "importing it registers the operators"
aten, llmc_ops = torch.ops.aten, torch.ops.llmc


def program_with(*factors: float | int | bool, dtype: torch.dtype = torch.float32) -> Program:
    """embedding → a product for each factor → head."""
    graph = fx.Graph()
    ids, _, rows = (graph.placeholder(entry.name) for entry in TRACE_INPUTS)
    table = graph.create_node("get_attr", "embed.weight", name="embed_weight")
    x = graph.call_function(llmc_ops.embedding.default, (ids, table))
    for factor in factors:
        x = graph.call_function(aten.mul.Tensor, (x, factor))
    last = graph.call_function(llmc_ops.gather_rows.default, (x, rows))
    graph.output(graph.call_function(llmc_ops.linear.default, (last, table, None)))
    spec = ModelSpec(
        family="toy",
        architecture="Toy",
        num_layers=0,
        hidden_size=8,
        vocab_size=16,
        max_context=32,
        compute_dtype=str(dtype).removeprefix("torch."),
        tied_head=False,
        num_parameters=128,
        attention=(),
    )
    store = WeightStore({"embed.weight": Constant(torch.randn(16, 8).to(dtype))}, {})
    program = Program(graph=graph, inputs=TRACE_INPUTS, weights=store, spec=spec, facts=frozenset({"traced"}))
    infer(program)
    return program


def factors_left(program: Program) -> list[object]:
    return [node.args[1] for node in program.graph.nodes if node.target is aten.mul.Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("factors", "left"), [((1.0,), []), ((1.0, 0.5, 1), [0.5]), ((1.0000001,), [1.0000001]), ((), [])]
)
def test_only_products_with_one_go(dtype: torch.dtype, factors: tuple[float, ...], left: list[float]) -> None:
    program = program_with(*factors, dtype=dtype)
    before = print_program(program)
    after = run_passes(program, [DropUnitScale()], PassContext(), [Verification(), NumericContract()])
    assert factors_left(after) == left
    assert after.history[-1].matches == len(factors) - len(left)
    assert after.history[-1].divergence == 0.0
    assert print_program(program) == before, "the program given is left alone"
