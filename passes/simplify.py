"""Few forms for many: one operator for each kind of view, none where nothing changes.

    v = aten.view(x, [T, -1, 16])                    v = aten.reshape(x, [-1, 4, 16])
    t = aten.transpose(v, 0, 1)
    u = aten.transpose(t, 0, 1)                →     (users of u read v)
    s = aten.split(y, 96, 1); g = getitem(s, 1)      g = aten.slice(y, 1, 96, 192)
    c = aten._to_copy(y, dtype=float32)              (users of c read y, which is float32)

After it the only shape operators are reshape, permute, slice, select, expand and cat, and a permutation that
another one undoes further down is gone, together with its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..ir.program import Program
from .base import Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .drop_batch import UNBATCHED
from .graph import erase_dead
from .permutations import eliminate_permutes
from .simplify_rules import simplified

SIMPLE = "simple"
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplify:
    """Canonical views, no no-ops, no permutation that is undone."""

    name: ClassVar[str] = "simplify"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({UNBATCHED})
    provides: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite node by node, then cancel permutations; misses name those that stay."""
        graph = program.copy_graph()
        matches, misses = simplify_graph(graph)
        report = PassReport(matches=matches, misses=tuple(misses))
        return PassResult(program=program.replace(graph=graph), report=report)


def simplify_graph(graph: fx.Graph) -> tuple[int, list[str]]:
    """Simplify an inferred graph in place; gives the number of rewrites and why permutations stay."""
    total, misses = 0, list[str]()
    for _ in range(_ROUNDS):
        total += _rewrite_nodes(graph)
        cancelled, misses = eliminate_permutes(graph)
        total += cancelled
        erase_dead(graph)
        if not cancelled:
            break
    return total, misses


def _rewrite_nodes(graph: fx.Graph) -> int:
    """One walk in order, so that every rule sees producers that are simple already."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        with graph.inserting_before(node):
            better = simplified(node)
        if better is not None and better is not node:
            better.meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(better)
            graph.erase_node(node)
            count += 1
    return count
