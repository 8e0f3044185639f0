"""The pass that docs/how-to-add-a-pass.md writes does what the page says."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
from torch import fx

from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.weights import Constant, WeightStore
from llmc.passes.base import PassContext
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.manager import run_passes
from llmc.spec.model import ModelSpec

assert ops, "importing it registers the operators"
aten, llmc_ops = torch.ops.aten, torch.ops.llmc


@pytest.fixture(scope="module")
def drop_unit_scale(request):
    """The page's Python block, loaded as the module it says it is."""
    page = request.config.rootpath / "docs" / "how-to-add-a-pass.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("llmc.passes.drop_unit_scale")
    module.__package__ = "llmc.passes"
    sys.modules[module.__name__] = module
    exec(compile(code, str(page), "exec"), module.__dict__)
    yield module.DropUnitScale()
    del sys.modules[module.__name__]


def program_with(*factors):
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
        compute_dtype="float32",
        tied_head=False,
        num_parameters=128,
        attention=(),
    )
    store = WeightStore({"embed.weight": Constant(torch.randn(16, 8))}, {})
    program = Program(graph=graph, inputs=TRACE_INPUTS, weights=store, spec=spec, facts=frozenset({"traced"}))
    infer(program)
    return program


def factors_left(program):
    return [node.args[1] for node in program.graph.nodes if node.target is aten.mul.Tensor]


def test_products_with_one_are_dropped_and_others_stay(drop_unit_scale):
    program = program_with(1.0, 0.5, 1)
    after = run_passes(program, [drop_unit_scale], PassContext(), [Verification(), NumericContract()])
    assert factors_left(after) == [0.5]
    assert factors_left(program) == [1.0, 0.5, 1], "the program given is left alone"
    assert after.history[-1].name == "drop_unit_scale"
    assert after.history[-1].matches == 2
    assert after.history[-1].divergence == 0.0


def test_a_recipe_may_count_on_matches(drop_unit_scale):
    wanting = type(drop_unit_scale)(expect=1)
    with pytest.raises(Exception, match="matched 0 times where the recipe expects 1"):
        run_passes(program_with(2.0), [wanting], PassContext())
