"""What a graph says where a program cannot be lowered."""

from __future__ import annotations

import pytest
import torch

from llmc.codegen.onnx.lowered import Export, lower
from llmc.codegen.onnx.stored import StoredWeights
from llmc.ir.infer import infer
from llmc.spec.errors import InternalError, TargetError


def with_operator(program, operator, args=()):
    """`program` with `operator` applied to its logits, as if the head's module had."""
    graph = program.copy_graph()
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        node = graph.call_function(operator, (output.args[0], *args))
    node.meta["module"] = "model.layers.3.odd_head"
    output.args = (node,)
    changed = program.replace(graph=graph)
    infer(changed)
    return changed


def test_an_operator_without_a_lowering_is_named_with_its_module(portable_program):
    program = with_operator(portable_program("gpt2"), torch.ops.aten.erfinv.default)
    nowhere = dict.fromkeys(program.weights, None)
    with pytest.raises(TargetError) as caught:
        lower(program, StoredWeights(program.weights, _Places(nowhere)), Export(), {})
    assert "aten.erfinv.default" in caught.value.what
    assert "model.layers.3.odd_head" in caught.value.why
    assert "docs/design/onnx.md" in caught.value.fix


def test_a_weight_that_was_not_written_is_a_defect(portable_program):
    program = portable_program("gpt2")
    with pytest.raises(InternalError, match="was not written"):
        lower(program, StoredWeights(program.weights, {}), Export(), {})


class _Places(dict):
    """Every weight lies at the start of one file."""

    def __getitem__(self, name):
        from llmc.codegen.onnx.graph import StoredTensor

        return StoredTensor("w", 0, 0)
