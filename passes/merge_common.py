"""Compute once what the graph computes several times.

    a = aten.unsqueeze(cos, 0)    (layer 0)
    b = aten.unsqueeze(cos, 0)    (layer 1)      →    a alone; users of b read a

Two calls are the same when operator and arguments are: every operator of the vocabulary but the cache
writes is a function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ..ir.program import Program
from .base import TRACED, Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .graph import mutates


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCommon:
    """Merge calls of one operator with the same arguments."""

    name: ClassVar[str] = "merge_common"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({TRACED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge in one walk; a match is a call that went away."""
        graph = program.copy_graph()
        merged = merge_common(graph)
        return PassResult(program=program.replace(graph=graph), report=PassReport(matches=merged))


def merge_common(graph: fx.Graph) -> int:
    """Merge equal calls of `graph` in place; returns how many went away."""
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or mutates(node.target):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            merged += 1
    return merged


def _frozen(arg: Any) -> Any:
    """An argument as a hashable key; 1, 1.0 and True are told apart."""
    if isinstance(arg, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(arg.items()))
    if isinstance(arg, list | tuple):
        return tuple(_frozen(item) for item in arg)
    if isinstance(arg, slice):
        return ("slice", _frozen(arg.start), _frozen(arg.stop), _frozen(arg.step))
    if isinstance(arg, float):
        return ("float", arg.hex())
    return (type(arg), arg)
