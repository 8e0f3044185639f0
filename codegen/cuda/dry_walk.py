"""What a program needs, kernels and memory: one walk over fake tensors for each class of step. Computes
nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...artifact.cuda import ArenaPlan
from ...ir.interpret import interpret
from ...ir.program import Program
from ...kernels.cuda.launch import Launch, Specialisation
from ...kernels.cuda.operators import CudaOperators
from ...kernels.cuda.sampler import DeviceSampler, Samples, make_space, make_tables
from ...kernels.cuda.substitution import substitute
from ...kernels.cuda.variants import Choose, modelled
from ...spec.history import is_invariant
from .arena_plan import ArenaWalk

# Rows of a product fall into these classes (see `kernels.cuda.products`); of a single row torch gives other
# strides, which kernels are specialised by.
ROW_CLASSES = (1, 8, 16, 32, 64, 128)


@dataclass(slots=True)
class Recorder:
    """A launcher that carries nothing out and keeps what would be needed, each once, in order."""

    found: dict[str, Specialisation] = field(default_factory=dict[str, Specialisation])

    def __call__(self, launch: Launch) -> None:
        self.found.setdefault(launch.specialisation.key, launch.specialisation)


@dataclass(frozen=True, slots=True)
class Needs:
    """Every specialisation that any step of a program may launch, and of each captured step the places of its
    tensors."""

    kernels: list[Specialisation]
    arenas: tuple[ArenaPlan, ...]


def needs_of(program: Program, weights: Mapping[str, Any], choose: Choose = modelled) -> Needs:
    """What a final `program` needs of kernels and of memory.

    `weights` gives shape and dtype of each stored weight by the name that the program reads; `choose` says
    which variants products take.
    """
    recorder = Recorder()
    invariant = is_invariant(program.history)
    graph = substitute(program.graph, CudaOperators(recorder, choose=choose, invariant=invariant))
    for rows in ROW_CLASSES:
        for sequences in (rows, 1):
            sizes = {"T": rows, "S": sequences, "Q": sequences + 1, "L": rows}
            walk(program, graph, weights, sizes, lambda logits: _sample(recorder, logits))
    assert program.cache is not None
    for group in program.cache.groups:
        _open(recorder, group.page_tokens)
    return Needs(list(recorder.found.values()), _arenas(program, weights, choose))


def _arenas(program: Program, weights: Mapping[str, Any], choose: Choose) -> tuple[ArenaPlan, ...]:
    """A plan for every batch size that is captured, with block tables of the longest sequences."""
    assert program.cache is not None
    plans: list[ArenaPlan] = []
    for rows in program.capture.decode_rows if program.capture is not None else ():
        arena = ArenaWalk()
        invariant = is_invariant(program.history)
        operators = CudaOperators(Recorder(), arena.empty, choose=choose, invariant=invariant)
        graph = substitute(program.graph, operators)
        sizes = {"T": rows, "S": rows, "Q": rows + 1, "L": rows}
        for index, group in enumerate(program.cache.groups):
            sizes[f"B{index}"] = group.pages_for(program.spec.max_context)
        walk(program, graph, weights, sizes, lambda logits: None)
        plans.append(ArenaPlan(rows=rows, offsets=arena.offsets(), num_bytes=arena.bytes))
    return tuple(plans)


def _sample(recorder: Recorder, logits: Tensor) -> None:
    """The kernels that sample such logits."""
    sampler, (count, vocab_size) = DeviceSampler(recorder), logits.shape
    tables, space = make_tables(_fake, 1, vocab_size, ()), make_space(_fake, count, vocab_size)
    column = _fake((count,), "int32")
    names = ("row_of", "ahead", "drafts", "mask_of", "first", "count")
    samples = Samples(masks=tables.banned, **dict.fromkeys(names, column))
    for filtered in (False, True):
        sampler.sample(logits, samples, tables, space, _fake((count, 2), "int32"), filtered=filtered)


def _open(recorder: Recorder, page_tokens: int) -> None:
    """The kernels that open a step over pages of that size."""
    sampler = DeviceSampler(recorder)
    with FakeTensorMode():
        tables = make_tables(_fake, 1, 32, (1,))
        column = _fake((1,), "int64")
        groups = [(_fake((1, 1), "int64"), column, page_tokens)]
        given = (_fake((1,), "int32"), _fake((1,), "int32"), _fake((1,), "int32"))
        sampler.open_step(given, tables, column, column, groups)
        sampler.change_pages(_fake((1, 3), "int32"), tables.tables[0])
        sampler.fill_ids(column, _fake((1,), "int32"), tables.state)


def _fake(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype))


def walk(
    program: Program,
    graph: fx.Graph,
    weights: Mapping[str, Any],
    sizes: dict[str, int],
    see: Callable[[Tensor], None],
    see_weight: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Interpret `graph` on tensors without data; `see` gets the logits, `see_weight` every weight with its
    name."""
    with FakeTensorMode():

        def fake(shape: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
            known = [size if isinstance(size, int) else sizes.get(size, 1) for size in shape]
            return torch.empty(known, dtype=dtype)

        inputs = {each.name: fake(each.shape, getattr(torch, each.dtype)) for each in program.inputs}

        def weight(name: str) -> Tensor:
            tensor = fake(tuple(weights[name].shape), weights[name].dtype)
            if see_weight is not None:
                see_weight(name, tensor)
            return tensor

        see(interpret(graph, inputs, weight))
