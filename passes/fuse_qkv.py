"""Project queries, keys and values in one product.

    q = llmc.linear(x, wq, None)                         y = llmc.linear(x, wq+wk+wv, None)
    k = llmc.linear(x, wk, None)                    →    q = aten.slice(y, 1, 0, 64)
    v = llmc.linear(x, wv, None)                         k = aten.slice(y, 1, 64, 96) ...

Candidates are the linears nearest above the q, k and v of one attention, and those nearest above these (the
down-projections of latent attention); those of one input are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..ir.program import Program
from ..ir.weights import Expr
from .base import CANONICAL, Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .fuse_linears import join_linears, nearest_linears, obstacle, slice_last
from .graph import argument, calls, erase_dead

ATTENTION = torch.ops.llmc.attention.default


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseQkv:
    """Join the projections of each attention that read the same input."""

    name: ClassVar[str] = "fuse_qkv"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-6)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per joined product; misses say why an attention keeps separate ones."""
        graph = program.copy_graph()
        added: dict[str, Expr] = {}
        misses: list[str] = []
        matches = 0
        for attention in calls(graph, ATTENTION):
            joined = False
            for group in _by_input(_projections(attention)):
                if len(group) < 2:
                    continue
                reason = obstacle(group, program)
                if reason is not None:
                    misses.append(reason)
                    continue
                added |= _join(graph, program, group)
                joined = True
                matches += 1
            if not joined:
                misses.append(f"{attention.name}: no two projections share an input")
        erase_dead(graph)
        done = program.replace(graph=graph, weights=program.weights.with_entries(added))
        return PassResult(program=done, report=PassReport(matches=matches, misses=tuple(misses)))


def _projections(attention: fx.Node) -> list[fx.Node]:
    """The linears at most two above q, k and v, the nearest first.

    Of an attention that reads another layer's cache only q counts: its own k and v are about to die.
    """
    reads_own = argument(attention, "kv_source") == argument(attention, "layer")
    names = ("q", "k", "v") if reads_own else ("q",)
    nearest = [linear for name in names for linear in nearest_linears(argument(attention, name))]
    further = [linear for below in nearest for linear in nearest_linears(argument(below, "x"))]
    return list(dict.fromkeys((*nearest, *further)))


def _by_input(linears: list[fx.Node]) -> list[list[fx.Node]]:
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        groups.setdefault(argument(node, "x"), []).append(node)
    return list(groups.values())


def _join(graph: fx.Graph, program: Program, group: list[fx.Node]) -> dict[str, Expr]:
    joined, added = join_linears(graph, program, group)
    start, last = 0, joined
    for node in group:
        shape = node.meta["val"].shape
        with graph.inserting_after(last):
            last = slice_last(graph, joined, len(shape), start, start + shape[-1])
        node.replace_all_uses_with(last)
        start += shape[-1]
    return added
