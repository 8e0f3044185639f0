"""What tests of the canonicalise stage share: programs of small modules and of families, and their logits."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

from llmc.compiler.lowering import lower
from llmc.compiler.trace import trace_config
from llmc.ir import ops
from llmc.ir.infer import infer
from llmc.ir.interpret import interpret
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.verify import verify
from llmc.ir.weights import Constant, Unbound
from llmc.models.families import family_named
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.spec.model import ModelSpec

assert ops, "importing it registers the operators"

LENGTHS = (5, 23, 1, 11)


def bind(program, seed=0):
    """Give every unbound weight random values, those of norms near 1."""
    random = torch.Generator().manual_seed(seed)
    values = {}
    for name in program.weights:
        expr = program.weights[name]
        if isinstance(expr, Unbound):
            near = 1.0 if len(expr.shape) == 1 and name.endswith("weight") else 0.0
            scale = 0.2 if len(expr.shape) < 2 else 0.15
            value = near + scale * torch.randn(expr.shape, generator=random)
            values[name] = Constant(value.to(expr.dtype))
    return program.replace(weights=program.weights.with_entries(values))


def _packed(vocab, seed=1):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, positions.shape, generator=random)
    rows = torch.tensor([0, 4, 27, 28, 39, 12])
    return {"input_ids": ids, "positions": positions, "out_rows": rows}


@pytest.fixture
def logits():
    """`logits(program)`: its result on one packed batch of several sequences."""

    def run(program):
        inputs = _packed(program.spec.vocab_size)
        return interpret(program.graph, inputs, program.weights.evaluate).float()

    return run


@pytest.fixture
def closeness(logits):
    """`closeness(before, after)`: the largest difference of their logits, relative to the largest logit."""

    def compare(before, after):
        wanted = logits(before)
        assert torch.isfinite(wanted).all()
        return float((logits(after) - wanted).abs().max() / wanted.abs().max())

    return compare


@pytest.fixture
def apply():
    """`apply(program, *passes)`: the verified program after them."""

    def run(program, *passes):
        result = run_passes(program, passes, PassContext())
        verify(result)
        return result

    return run


@pytest.fixture(scope="session")
def family():
    """`family(name, dtype)`: the traced program of a family of the table, with random weights."""

    @cache
    def trace(name, dtype=torch.float32):
        entry = family_named(name)
        config = getattr(transformers, entry.config)(**entry.options)
        return bind(trace_config(config, dtype=dtype))

    return trace


@pytest.fixture
def export():
    """`export(module)`: the program of a module `(input_ids[T], positions[T], out_rows[L]) -> logits[L, 16]`.

    `attention` lists the AttentionSpec of each attention in it. The module's parameters are its weights.
    """

    def trace(module: nn.Module, attention=(), max_context=4096) -> Program:
        tokens, rows = Dim("T", min=1), Dim("L", min=1)
        inputs = (torch.zeros(13, dtype=torch.int64), torch.arange(13), torch.arange(5))
        with torch.no_grad():
            exported = torch.export.export(
                module.eval(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: rows}), strict=False
            )
        lowered = lower(exported, {})
        state = {name: Constant(value.detach()) for name, value in module.state_dict().items()}
        spec = ModelSpec(
            family="sketch",
            architecture="Sketch",
            num_layers=0,
            hidden_size=16,
            vocab_size=16,
            max_context=max_context,
            compute_dtype="float32",
            tied_head=False,
            num_parameters=0,
            attention=attention,
        )
        program = Program(
            graph=lowered.graph,
            inputs=TRACE_INPUTS,
            weights=lowered.weights.with_entries(
                {name: value for name, value in state.items() if name in lowered.weights}
            ),
            spec=spec,
            facts=frozenset({"traced"}),
        )
        infer(program)
        verify(program)
        return program

    return trace
