"""Inputs of a paged program: which there are, and their values for one step.

Pure arithmetic over block tables; who owns a page, and when it is free again, is the runtime's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..spec.cache import CacheGroup, CacheLayout
from ..spec.errors import InternalError
from .program import TRACE_INPUTS, GraphInput

QUERY_STARTS = "query_starts"


def block_table_name(group: int) -> str:
    """The input that holds the block tables of cache group `group`."""
    return f"block_table_{group}"


def slots_name(group: int) -> str:
    """The input that says where the step's tokens are written in cache group `group`."""
    return f"slots_{group}"


def k_cache_name(layer: int) -> str:
    """The input that is the key cache of owning layer `layer`."""
    return f"k_cache_{layer}"


def v_cache_name(layer: int) -> str:
    """The input that is the value cache of owning layer `layer`."""
    return f"v_cache_{layer}"


def k_scales_name(layer: int) -> str:
    """The input that holds the scales of a key cache of codes."""
    return f"k_scales_{layer}"


def v_scales_name(layer: int) -> str:
    """The input that holds the scales of a value cache of codes."""
    return f"v_scales_{layer}"


def cache_names(group: CacheGroup, layer: int) -> tuple[str, ...]:
    """The inputs that are the cache of owning layer `layer`, in the order of a program's placeholders."""
    values = (k_cache_name(layer), v_cache_name(layer))
    return (*values, k_scales_name(layer), v_scales_name(layer)) if group.scales else values


def paged_inputs(layout: CacheLayout) -> tuple[GraphInput, ...]:
    """All inputs of a program over `layout`, in the order of its placeholders."""
    tables: list[GraphInput] = []
    caches: dict[int, tuple[GraphInput, ...]] = {}
    for index, group in enumerate(layout.groups):
        tables.append(GraphInput(name=block_table_name(index), shape=("S", f"B{index}"), dtype="int64"))
        tables.append(GraphInput(name=slots_name(index), shape=("T",), dtype="int64"))
        for layer in group.layers:
            entries = zip(cache_names(group, layer), _cache_tensors(group), strict=True)
            caches[layer] = tuple(
                GraphInput(name=name, shape=(f"P{index}", *shape), dtype=dtype)
                for name, (shape, dtype) in entries
            )
    starts = GraphInput(name=QUERY_STARTS, shape=("Q",), dtype="int64")
    return (*TRACE_INPUTS, starts, *tables, *(entry for layer in sorted(caches) for entry in caches[layer]))


def _cache_tensors(group: CacheGroup) -> list[tuple[tuple[int, ...], str]]:
    """Shape of a page and dtype of each cache tensor of a layer, in the order of `cache_names`."""
    heads = (group.page_tokens, group.num_kv_heads)
    values = [((*heads, width), group.dtype) for width in (group.k_dim, group.v_dim)]
    return [*values, (heads, "float32"), (heads, "float32")] if group.scales else values


def allocate_caches(layout: CacheLayout, num_pages: Sequence[int]) -> dict[str, Tensor]:
    """Zeroed cache tensors by input name; `num_pages[g]` physical pages in group g.

    Raises InternalError for a group stored in a form that reference operators do not read.
    """
    caches: dict[str, Tensor] = {}
    for group, pages in zip(layout.groups, num_pages, strict=True):
        if group.scales != group.is_coded or group.v_source != "own":
            raise InternalError(
                "ir.cache_form",
                f"Cache group of layers {list(group.layers)} cannot be allocated.",
                "Its values are aliased, or codes without scales, or scaled without being codes.",
                "Use a layout with its own values, and scales with int8 and float8_e4m3fn alone.",
            )
        for layer in group.layers:
            entries = zip(cache_names(group, layer), _cache_tensors(group), strict=True)
            for name, (shape, dtype) in entries:
                caches[name] = torch.zeros(pages, *shape, dtype=getattr(torch, dtype))
    return caches


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSequence:
    """One sequence's part in a step.

    `token_ids` stand at positions `start`, `start + 1`, …; `start` tokens are in the cache already.
    `block_tables[g][i]` is the page of group g that holds positions `i * page_tokens` on; -1 marks a
    page that was given back because no query can see it any more. `wanted` lists the tokens of
    this step (0 is the first) whose logits are asked for.
    """

    start: int
    token_ids: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    wanted: Sequence[int] = ()


class SequenceLike(Protocol):
    """What `PagedSequence` has, by whoever holds it."""

    @property
    def start(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def block_tables(self) -> Sequence[Sequence[int]]: ...
    @property
    def wanted(self) -> Sequence[int]: ...


def step_inputs(layout: CacheLayout, sequences: Sequence[SequenceLike]) -> dict[str, Tensor]:
    """The inputs of one step over `sequences`, by name, all but the caches.

    Rows of a sequence are contiguous, in the order given; logits come back in the order of `sequences` and
    `wanted`. Raises InternalError when a token of the step has no page.
    """
    lengths = [len(sequence.token_ids) for sequence in sequences]
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    positions = [_positions(sequence) for sequence in sequences]
    rows = [
        first + row for first, sequence in zip(starts, sequences, strict=False) for row in sequence.wanted
    ]
    inputs = {
        "input_ids": _int64([token for sequence in sequences for token in sequence.token_ids]),
        "positions": _int64([position for part in positions for position in part]),
        "out_rows": _int64(rows),
        QUERY_STARTS: _int64(starts),
    }
    for index, group in enumerate(layout.groups):
        tables = [sequence.block_tables[index] for sequence in sequences]
        inputs[block_table_name(index)] = _padded(tables)
        slots: list[int] = []
        for table, part in zip(tables, positions, strict=True):
            slots += _slots(group, table, part)
        inputs[slots_name(index)] = _int64(slots)
    return inputs


def _positions(sequence: SequenceLike) -> range:
    return range(sequence.start, sequence.start + len(sequence.token_ids))


def _slots(group: CacheGroup, table: Sequence[int], positions: range) -> list[int]:
    """Where consecutive tokens are written: within a page, side by side."""
    slots: list[int] = []
    position = positions.start
    while position < positions.stop:
        stop = min(positions.stop, position - position % group.page_tokens + group.page_tokens)
        first = _slot(group, table, position)
        slots += range(first, first + stop - position)
        position = stop
    return slots


def _slot(group: CacheGroup, table: Sequence[int], position: int) -> int:
    index, offset = divmod(position, group.page_tokens)
    page = table[index] if index < len(table) else -1
    if page < 0:
        raise InternalError(
            "ir.no_page",
            f"The token at position {position} has no page in its block table.",
            f"The table has {len(table)} pages of {group.page_tokens} tokens, and page {index} is not held.",
            "Reserve pages for every token of a step before it is built.",
        )
    return page * group.page_tokens + offset


def _padded(tables: Sequence[Sequence[int]]) -> Tensor:
    width = max((len(table) for table in tables), default=0)
    return _int64([[*table, *(-1 for _ in range(width - len(table)))] for table in tables]).reshape(
        len(tables), width
    )


def _int64(values: list[int] | list[list[int]]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64))  # in a third of the time that torch takes


@dataclass(frozen=True, slots=True, kw_only=True)
class PageAssignment:
    """Pages for a fixed set of sequences: `tables[s][g]` block tables, `num_pages[g]` pages in all."""

    tables: tuple[tuple[tuple[int, ...], ...], ...]
    num_pages: tuple[int, ...]


def scatter_pages(layout: CacheLayout, lengths: Sequence[int], seed: int) -> PageAssignment:
    """Pages for whole sequences of `lengths` tokens, none shared, in an order shuffled by `seed`.

    For checks that run a program without a runtime: neighbours in a sequence are not neighbours in memory.
    """
    shuffle = random.Random(seed).shuffle
    per_group: list[list[tuple[int, ...]]] = []
    totals: list[int] = []
    for group in layout.groups:
        counts = [group.pages_for(length) for length in lengths]
        pages = list(range(sum(counts)))
        shuffle(pages)
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        per_group.append([tuple(pages[end - count : end]) for end, count in zip(ends, counts, strict=True)])
        totals.append(len(pages))
    tables = tuple(tuple(group[index] for group in per_group) for index in range(len(lengths)))
    return PageAssignment(tables=tables, num_pages=tuple(totals))
