"""Drop multiplications by 1.

y = aten.mul(x, 1.0)          →     (users of y read x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmc.ir.program import Program
from llmc.passes.base import (
    TRACED,
    Contract,
    Exact,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
)
from llmc.passes.graph import calls, erase_dead
from llmc.passes.rewrite import aten, dtype_of, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class DropUnitScale:
    """Drop multiplications by 1."""

    name: ClassVar[str] = "drop_unit_scale"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({TRACED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Let users read the operand; misses name products that change the dtype."""
        graph = program.copy_graph()
        matches, misses = 0, []
        for node in calls(graph, aten.mul.Tensor):
            source, factor = node.args
            if isinstance(factor, bool) or factor != 1:
                continue
            if dtype_of(node) != dtype_of(source):
                misses.append(f"{node.name}: the product has another dtype than its operand")
                continue
            replace(node, source)
            matches += 1
        erase_dead(graph)
        report = PassReport(matches=matches, misses=tuple(misses))
        return PassResult(program=program.replace(graph=graph), report=report)
