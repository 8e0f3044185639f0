"""Round weights to the nearest code of a scheme, without data.

    w = weight a.weight                        c = weight a.weight.codes
    y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                               y = llmc.quantized_linear(x, c, s, None, None, 'int4_g32')

Embeddings and experts likewise. A table tied to the head is quantised once and both read the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ..base import CANONICAL, QUANTIZED, Contract, Lossy, PassContext, PassReport, PassResult, Stage
from .replace import parts_of
from .selection import WeightOptions, decisions_on, misses_of, replace_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn(WeightOptions):
    """Round-to-nearest quantisation of linears, experts, head and embedding."""

    name: ClassVar[str] = "rtn"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept."""
        graph = program.copy_graph()
        choices = self.choices(graph, program)
        done = replace_weights(program, graph, choices, parts_of)
        report = PassReport(
            matches=sum(choice.scheme is not None for choice in choices.values()),
            decisions=decisions_on(choices),
            misses=misses_of(program, choices),
        )
        return PassResult(program=done, report=report)
