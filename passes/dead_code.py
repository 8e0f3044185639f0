"""Erase what nobody reads, and the weights that only that read.

c = aten.cos(a)            (no users)      →    (gone, and `a` with it if that was its only user)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Program
from .base import TRACED, Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .graph import erase_dead


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadCode:
    """Erase unused nodes and weights."""

    name: ClassVar[str] = "dead_code"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({TRACED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Erase; a match is a node that went away."""
        graph = program.copy_graph()
        erase_dead(graph)
        cleaned = program.replace(graph=graph)
        cleaned = cleaned.replace(weights=program.weights.restricted_to(cleaned.used_weights()))
        report = PassReport(matches=program.num_nodes - cleaned.num_nodes)
        return PassResult(program=cleaned, report=report)
