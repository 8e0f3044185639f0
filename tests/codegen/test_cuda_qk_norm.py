"""Norms of queries and keys cost no launch: a program with them launches what one without launches, and
computes what its operators compute."""

from __future__ import annotations

import pytest
import torch

from llmc.codegen.cuda.dry_walk import walk
from llmc.ir.interpret import interpret
from llmc.ir.paged import allocate_caches, step_inputs
from llmc.kernels.cuda.operators import CudaOperators
from llmc.kernels.cuda.substitution import substitute
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import layout, plan
from llmc.runtime.executors.tiles import SequencePart
from llmc.spec.target import parse_target

pytest.importorskip("triton")


@pytest.fixture
def laid_out(portable_program):
    context = PassContext(target=parse_target("cuda:sm_90"), max_model_len=32)
    return lambda family: run_passes(portable_program(family), (*layout(), *plan()), context, [])


def launched(program):
    """The kernels of a step of one token, in order."""
    found = []
    weights = {name: program.weights[name] for name in program.used_weights()}
    graph = substitute(program.graph, CudaOperators(found.append))
    walk(program, graph, weights, {"T": 1, "S": 1, "Q": 2, "L": 1}, lambda logits: None)
    return [launch.specialisation for launch in found]


def test_a_model_with_norms_of_heads_launches_no_more(laid_out):
    plain, normed = launched(laid_out("llama")), launched(laid_out("qwen3"))
    assert [each.kernel for each in normed] == [each.kernel for each in plain]
    rotations = [dict(each.constants)["NORM"] for each in normed if each.kernel == "rope.rope_kv_write"]
    assert rotations
    assert set(rotations) == {"cast_then_scale"}


def test_launches_compute_what_the_operators_compute(laid_out):
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit

    correct_interpreter()
    program = laid_out("qwen3")
    tables = [[1] for _ in program.cache.groups]
    ids = [3, 5, 8, 13, 21]
    part = SequencePart(start=0, token_ids=ids, block_tables=tables, wanted=list(range(len(ids))))
    logits = []
    for graph in (program.graph, substitute(program.graph, CudaOperators(launch_jit))):
        caches = allocate_caches(program.cache, [2 for _ in program.cache.groups])
        inputs = step_inputs(program.cache, [part]) | caches
        logits.append(interpret(graph, inputs, program.weights.evaluate))
    expected, found = logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
