"""Round weights on scales that were searched for, by calibration tokens or by the weights alone.

w = weight a.weight                        c = weight a.weight.codes
y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                           y = llmc.quantized_linear(x, c, s, None, None, 'int4_g32')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ..base import CANONICAL, QUANTIZED, Contract, Lossy, PassContext, PassResult, Stage, option
from .rounding import Method
from .selection import WeightOptions
from .solving import run_solver


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch(WeightOptions):
    """Rounding on searched scales, errors weighed by the second moments of each group's inputs."""

    name: ClassVar[str] = "scale_search"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()

    data: bool = option(True, "Weigh errors by calibration tokens; otherwise by the weights alone.")

    @property
    def calibrated(self) -> bool:
        """Whether the pass looks at activations."""
        return self.data

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept."""
        return run_solver(self, program, context, Method(search=True), data=self.data)
