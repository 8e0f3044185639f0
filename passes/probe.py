"""Run a program on a small batch, before or after paging, and give the logits of every token.

Knows how inputs are made for either kind of program; judges nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ir.interpret import Observer, interpret
from ..ir.paged import PagedSequence, allocate_caches, scatter_pages, step_inputs
from ..ir.program import Program
from ..ir.weights import Constant, Expr, Unbound
from ..spec.model import ModelSpec
from .base import PAGED

_LENGTHS = (37, 1, 5, 20)
_NUM_STEPS = 3


def probe_sequences(spec: ModelSpec, seed: int) -> tuple[tuple[int, ...], ...]:
    """A few random token sequences of uneven length, none longer than the model's context."""
    draw = random.Random(seed)
    lengths = [min(length, spec.max_context) for length in _LENGTHS]
    return tuple(tuple(draw.randrange(spec.vocab_size) for _ in range(length)) for length in lengths)


def logits_of(
    program: Program, sequences: Sequence[Sequence[int]], observe: Observer | None = None
) -> Tensor:
    """Logits `[tokens of all sequences, vocab]`, sequence after sequence.

    A paged program runs in several mixed steps of chunked prefill over scattered pages, any other in one
    step of packed whole sequences. `observe(node, value)` sees every computed value of every step.
    """
    weight = program.weights.fetcher()
    if PAGED in program.facts:
        return _paged_logits(program, sequences, weight, observe)
    tokens = [token for sequence in sequences for token in sequence]
    inputs = {
        "input_ids": torch.tensor(tokens),
        "positions": torch.tensor([index for sequence in sequences for index in range(len(sequence))]),
        "out_rows": torch.arange(len(tokens)),
    }
    return interpret(program.graph, inputs, weight, observe)


def _paged_logits(
    program: Program,
    sequences: Sequence[Sequence[int]],
    weight: Callable[[str], Tensor],
    observe: Observer | None,
) -> Tensor:
    assert program.cache is not None
    pages = scatter_pages(program.cache, [len(sequence) for sequence in sequences], seed=0)
    caches = allocate_caches(program.cache, pages.num_pages)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(_NUM_STEPS):
        active: list[tuple[int, PagedSequence]] = []
        for index, sequence in enumerate(sequences):
            chunk = _chunk(sequence, step, pages.tables[index])
            if chunk is not None:
                active.append((index, chunk))
        if not active:
            continue
        inputs = step_inputs(program.cache, [chunk for _, chunk in active])
        logits: Tensor = interpret(program.graph, {**inputs, **caches}, weight, observe)
        sizes = [len(chunk.token_ids) for _, chunk in active]
        for (index, _), rows in zip(active, logits.split(sizes), strict=True):
            parts[index].append(rows)
    return torch.cat([rows for rows_of_sequence in parts for rows in rows_of_sequence])


def _chunk(sequence: Sequence[int], step: int, tables: Sequence[Sequence[int]]) -> PagedSequence | None:
    size = -(-len(sequence) // _NUM_STEPS)
    tokens = sequence[step * size : (step + 1) * size]
    if not tokens:
        return None
    return PagedSequence(start=step * size, token_ids=tokens, block_tables=tables, wanted=range(len(tokens)))


def with_random_weights(program: Program, seed: int) -> Program:
    """`program` with every parameter that has no values yet drawn at random.

    Matrices have variance 1 / fan-in, vectors lie near 1, so that activations keep their scale. The same
    name gets the same values wherever it occurs.
    """
    drawn: dict[str, Constant] = {}
    entries = {name: _bound(program.weights[name], seed, drawn) for name in program.weights}
    return program.replace(weights=program.weights.with_entries(entries))


def _bound(expr: Any, seed: int, drawn: dict[str, Constant]) -> Any:
    if isinstance(expr, Unbound):
        if expr.name not in drawn:
            drawn[expr.name] = Constant(_draw(expr, f"{seed}:{expr.name}"))
        return drawn[expr.name]
    if isinstance(expr, Constant) or not is_dataclass(expr) or isinstance(expr, type):
        return expr
    changes: dict[str, Any] = {}
    for entry in fields(expr):
        value: Any = getattr(expr, entry.name)
        if entry.name == "of":
            changes[entry.name] = _bound(value, seed, drawn)
        elif entry.name == "parts":
            changes[entry.name] = tuple(_bound(part, seed, drawn) for part in value)
    return replace(expr, **changes)


def _draw(expr: Expr, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(key).getrandbits(63))
    values = torch.randn(expr.shape, generator=generator)
    if len(expr.shape) < 2:
        return (1 + 0.1 * values).to(expr.dtype)
    return (values / expr.shape[-1] ** 0.5).to(expr.dtype)
