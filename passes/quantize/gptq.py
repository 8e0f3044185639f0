"""Round weights column by column, each error made up for by the columns after it (GPTQ), on searched scales.

w = weight a.weight                        c = weight a.weight.codes
y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                           y = llmc.quantized_linear(x, c, s, None, None, 'int4_g32')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ..base import CANONICAL, QUANTIZED, Contract, Lossy, PassContext, PassResult, Stage, option
from .rounding import Method, Tuning
from .selection import WeightOptions
from .solving import run_solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(WeightOptions):
    """Error propagation in static activation order, then descent over scales and codes."""

    name: ClassVar[str] = "gptq"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()
    calibrated: ClassVar[bool] = True

    search: bool = option(True, "Search scales first; otherwise those of rounding to nearest are used.")
    rounds: int = option(
        2, "Rounds of descent over scales and codes after error propagation.", low=0, high=50
    )

    catch_up: float = option(
        1.0,
        "Part of the drift of its inputs, caused by what was rounded before, that a layer makes up for.",
        low=0,
        high=1,
    )

    epochs: int = option(
        0, "Times that all tokens are gone through to learn codes and scales from the logits.", low=0, high=50
    )

    work: float = option(
        20.0,
        "Most multiply-adds that learning may take, in million millions; larger models get fewer epochs.",
        low=0,
        high=1e6,
    )

    @property
    def tuning(self) -> Tuning | None:
        """What follows once all weights have codes."""
        return Tuning(epochs=self.epochs, work=self.work) if self.epochs else None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept."""
        method = Method(
            search=self.search,
            propagate=True,
            rounds=self.rounds,
            catch_up=self.catch_up,
            tuning=self.tuning,
        )
        return run_solver(self, program, context, method, data=True)
