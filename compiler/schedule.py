"""Running a program over several sequences, packed or as a serving step would be: chunks of prompts and
single tokens side by side. Knows programs and pages; judges nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.interpret import interpret
from ..ir.paged import PagedSequence, allocate_caches, scatter_pages, step_inputs
from ..ir.program import Program

_FIRST_CHUNKS = (3, 7, 1, 11)
_LATER_CHUNKS = (1, 6, 1, 9, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRun:
    """Logits `[tokens, vocab]` of each sequence, and how many steps they took."""

    logits: tuple[Tensor, ...]
    num_steps: int


def run_packed(program: Program, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Logits `[tokens, vocab]` of each sequence, all of them whole in one step of a program before paging."""
    lengths = [len(ids) for ids in sequences]
    inputs = {
        "input_ids": torch.tensor([token for ids in sequences for token in ids]),
        "positions": torch.cat([torch.arange(length) for length in lengths]),
        "out_rows": torch.arange(sum(lengths)),
    }
    logits: Tensor = interpret(program.graph, inputs, _kept(program))
    return logits.split(lengths)


def run_mixed(program: Program, sequences: Sequence[Sequence[int]], *, seed: int) -> MixedRun:
    """Run a paged program in steps that mix chunked prefill with single tokens, over scattered pages."""
    assert program.cache is not None
    pages = scatter_pages(program.cache, [len(ids) for ids in sequences], seed)
    caches = allocate_caches(program.cache, pages.num_pages)
    weight = _kept(program)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    num_steps = 0
    while any(count < len(ids) for count, ids in zip(done, sequences, strict=True)):
        chosen: list[tuple[int, PagedSequence]] = []
        for index, ids in enumerate(sequences):
            size = chunk_size(index, num_steps, done[index], len(ids))
            if size:
                tokens = ids[done[index] : done[index] + size]
                chosen.append((index, _part(done[index], tokens, pages.tables[index])))
                done[index] += size
        inputs = step_inputs(program.cache, [part for _, part in chosen])
        logits: Tensor = interpret(program.graph, {**inputs, **caches}, weight)
        rows = logits.split([len(part.token_ids) for _, part in chosen])
        for (index, _), part in zip(chosen, rows, strict=True):
            parts[index].append(part)
        num_steps += 1
    return MixedRun(logits=tuple(torch.cat(rows) for rows in parts), num_steps=num_steps)


def chunk_size(index: int, step: int, done: int, length: int) -> int:
    """How many tokens sequence `index` takes in `step`, with `done` of `length` behind it."""
    if done == 0:
        return min(_FIRST_CHUNKS[index % len(_FIRST_CHUNKS)], length)
    return min(_LATER_CHUNKS[(index + step) % len(_LATER_CHUNKS)], length - done)


def _part(start: int, tokens: Sequence[int], tables: Sequence[Sequence[int]]) -> PagedSequence:
    return PagedSequence(start=start, token_ids=tokens, block_tables=tables, wanted=range(len(tokens)))


def _kept(program: Program) -> Callable[[str], Tensor]:
    """Weights by name, each evaluated once: for small models."""
    values: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in values:
            values[name] = program.weights.evaluate(name)
        return values[name]

    return read
