"""Round weights column by column, each error made up for by the columns after it (GPTQ), on searched scales.

w = weight a.weight                        c = weight a.weight.codes
y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                           y = llmc.quantized_linear(x, c, s, None, None, 'int4_g32')
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir.program import Program
from ...spec.quant import QuantScheme
from ..base import CANONICAL, QUANTIZED, Contract, Lossy, PassContext, PassResult, Stage, option
from .lifted import Lift, lift_choices
from .rounding import Method, Tuning
from .selection import WeightOptions
from .solving import run_choices


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

    growth: float = option(
        0.0,
        "Part of the model's bytes that 8 bits for the linears which change the output most may add.",
        low=0,
        high=1,
    )

    work: float = option(
        20.0,
        "Most multiply-adds that learning, or finding what deserves 8 bits, may take, in million millions; "
        "larger models get fewer epochs, and no growth.",
        low=0,
        high=1e6,
    )

    @property
    def tuning(self) -> Tuning | None:
        """What follows once all weights have codes."""
        return Tuning(epochs=self.epochs, work=self.work) if self.epochs else None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept, and with `growth` one
        what 8 bits were spent on."""
        method = Method(
            search=self.search,
            propagate=True,
            rounds=self.rounds,
            catch_up=self.catch_up,
            tuning=self.tuning,
        )
        choices = self.choices(program.copy_graph(), program)
        if not self.growth:
            return run_choices(self.name, choices, program, context, method, data=True)
        scheme = QuantScheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        lifted = lift_choices(self.name, program, choices, scheme, Lift(self.growth, self.work), context)
        done = run_choices(self.name, lifted.choices, program, context, method, data=True)
        report = replace(done.report, decisions=(lifted.decision, *done.report.decisions))
        return PassResult(program=done.program, report=report)
