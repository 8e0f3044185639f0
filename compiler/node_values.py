"""What every node of a program computes on a probe, a row a token, and how two programs' nodes differ.

Knows programs before and after paging; judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.interpret import Observer, interpret
from ..ir.paged import PagedSequence, allocate_caches, scatter_pages, step_inputs
from ..ir.program import Program
from ..ir.vocabulary import operator_name
from ..passes.base import PAGED

_NUM_STEPS = 3
_ATTENTION = ("llmc.attention.default", "llmc.paged_attention.default")
# What families call the list of their layers.
_LISTS = ("layers", "h", "blocks")
Weights = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """`rows[name]` is what node `name` computed, `[tokens of all sequences, ...]`, for nodes with a row a
    token; `logits` `[tokens, vocab]` are the program's result."""

    rows: Mapping[str, Tensor]
    logits: Tensor


def run_nodes(program: Program, sequences: Sequence[Sequence[int]]) -> NodeRun:
    """Run a program, whole sequences packed in one step, or in a few mixed steps once it is paged; either way
    rows are in the order of the sequences' tokens."""
    weight = kept_weights(program)
    if PAGED not in program.facts:
        tokens = [token for sequence in sequences for token in sequence]
        inputs = {
            "input_ids": torch.tensor(tokens),
            "positions": torch.cat([torch.arange(len(sequence)) for sequence in sequences]),
            "out_rows": torch.arange(len(tokens)),
        }
        seen = KeptRows(len(tokens))
        logits = interpret(program.graph, inputs, weight, seen.observe)
        return NodeRun(rows=seen.rows, logits=logits)
    return _run_paged(program, sequences, weight)


def _run_paged(program: Program, sequences: Sequence[Sequence[int]], weight: Weights) -> NodeRun:
    assert program.cache is not None
    lengths = [len(sequence) for sequence in sequences]
    pages = scatter_pages(program.cache, lengths, seed=0)
    layout, caches = program.cache, allocate_caches(program.cache, pages.num_pages)

    def forward(parts: Sequence[PagedSequence], observe: Observer) -> Tensor:
        return interpret(program.graph, {**step_inputs(layout, parts), **caches}, weight, observe)

    ends = [[-(-length // _NUM_STEPS) * (step + 1) for step in range(_NUM_STEPS)] for length in lengths]
    return run_steps(sequences, pages.tables, ends, forward)


def run_steps(
    sequences: Sequence[Sequence[int]],
    tables: Sequence[Sequence[Sequence[int]]],
    ends: Sequence[Sequence[int]],
    forward: Callable[[Sequence[PagedSequence], Observer], Tensor],
) -> NodeRun:
    """Run `sequences` in mixed steps: in step k sequence i goes on to token `ends[i][k]`, over the pages of
    `tables[i]`. `forward` gives the logits of all tokens of a step, and shows every node's value."""
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for step in range(max(map(len, ends))):
        chunks: list[tuple[int, PagedSequence]] = []
        for index, (sequence, table) in enumerate(zip(sequences, tables, strict=True)):
            start = ends[index][step - 1] if step else 0
            tokens = sequence[start : ends[index][step]]
            if tokens:
                wanted = range(len(tokens))
                part = PagedSequence(start=start, token_ids=tokens, block_tables=table, wanted=wanted)
                chunks.append((index, part))
        if not chunks:
            continue
        sizes = [len(part.token_ids) for _, part in chunks]
        seen = KeptRows(sum(sizes))
        logits = forward([part for _, part in chunks], seen.observe)
        for name, rows in [*seen.rows.items(), ("", logits.cpu())]:
            for (index, _), own in zip(chunks, rows.split(sizes), strict=True):
                parts.setdefault(name, {})[index, step] = own
    # Of a step with one token what has one row need not have a row a token.
    always = {name: found for name, found in parts.items() if len(found) == len(parts[""])}
    joined = {name: torch.cat([found[key] for key in sorted(found)]) for name, found in always.items()}
    logits = joined.pop("")
    return NodeRun(rows=joined, logits=logits)


class KeptRows:
    """Keeps what nodes compute where it has one row a token; dimensions of size 1 in front are dropped."""

    def __init__(self, num_tokens: int) -> None:
        self.rows: dict[str, Tensor] = {}
        self._num_tokens = num_tokens

    def observe(self, node: fx.Node, value: object) -> None:
        """Keep a copy of floating-point rows: operators may write into what they were given."""
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        while value.dim() > 1 and value.shape[0] == 1 and self._num_tokens != 1:
            value = value[0]
        if value.dim() and value.shape[0] == self._num_tokens:
            self.rows[node.name] = value.detach().float().clone().cpu()


def attention_nodes(program: Program) -> list[fx.Node]:
    """The nodes that attend, in order, before paging or after."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and operator_name(node.target) in _ATTENTION
    ]


def kept_weights(program: Program) -> Weights:
    """Weights by name, each evaluated once: for small models."""
    values: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in values:
            values[name] = program.weights.evaluate(name)
        return values[name]

    return read


def relative_error(expected: Tensor, found: Tensor) -> float:
    """`|found - expected| / |expected|` in the Frobenius norm; infinite where only one is finite."""
    if expected.numel() != found.numel():
        return float("inf")
    reference, other = expected.double().reshape(-1), found.double().reshape(-1)
    if not bool(other.isfinite().all()):
        return 0.0 if bool((other.isnan() == reference.isnan()).all()) else float("inf")
    scale = float(reference.norm())
    return float((other - reference).norm()) / scale if scale else float(other.norm() > 0)


def layer_of(node: fx.Node) -> str:
    """The part of the model a node comes from, for example `layers.3`: by the weights nearest to it above,
    or the module it was traced in; empty where neither is known."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        current = left.pop(0)
        if current in seen or len(seen) > 64:
            continue
        seen.add(current)
        name = str(current.target) if current.op == "get_attr" else str(current.meta.get("module", ""))
        parts = name.split(".")
        index = next((place for place, part in enumerate(parts[:-1]) if part in _LISTS), None)
        if index is not None and parts[index + 1].isdigit():
            return ".".join(parts[index : index + 2])
        left.extend(current.all_input_nodes)
    return ""
