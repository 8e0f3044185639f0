"""Give each weight the scheme that its influence on the output deserves, within a number of bits.

    a.weight, b.weight                    →    a.weight as int4_g128, b.weight as int8_g32, found by GPTQ

Influence is measured; the schemes follow from it by exact optimisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from ...ir.program import Program
from ...spec.errors import RecipeError
from ...spec.history import Decision
from ..base import (
    CANONICAL,
    QUANTIZED,
    Contract,
    Lossy,
    PassContext,
    PassResult,
    Stage,
    expect_option,
    option,
)
from ..bits import num_parameters
from .influence import TRIAL, measure_influence
from .knapsack import Assignment, assign
from .needs import SEARCH_NEEDS, require_calibration
from .rounding import Method, Tuning
from .selection import Choice, WeightOptions
from .sensitivity import Sensitivity, judged_pieces
from .solving import run_choices
from .units import Unit, parse_forms, units_of

# How codes are found when influence is measured.
_TRIALS = {
    "gptq": TRIAL,
    "scale_search": Method(),
    "rtn": Method(search=False),
}


class _Eligible(WeightOptions):
    """Which weights may be rounded at all."""

    name: ClassVar[str] = "mixed_precision"


class _Room(NamedTuple):
    """Stored bytes of what is not chosen for, and all parameters: what a budget in bits is about."""

    fixed_bytes: int
    num_parameters: int

    def bits(self, chosen_bytes: int) -> float:
        """Bits of a weight when units take so many bytes."""
        return 8 * (self.fixed_bytes + chosen_bytes) / self.num_parameters

    def capacity(self, bits: float) -> int:
        """Bytes that units may take; a number of bits that was computed from bytes stands for these bytes."""
        return int(bits * self.num_parameters / 8 * (1 + 1e-12)) - self.fixed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """A scheme for each weight within a budget of bits, by measured influence on the output."""

    name: ClassVar[str] = "mixed_precision"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()
    calibrated: ClassVar[bool] = True

    budget: float = option(
        4.5,
        "Most bits of a weight, on average: scales, zero points and kept weights count; 0 sets no limit.",
        low=0,
        high=32,
        search=(4.25, 4.5, 5.0, 6.0),
    )
    enough: float = option(
        0.0,
        "Sum of the divergences of all weights, in nats, that more bits are not spent to get below.",
        low=0,
        high=10,
    )
    schemes: str = option(
        "int4_g128, int4_g64, int4_g32, int8_g32",
        "Schemes to choose from, separated by commas; keep is a weight as it is.",
    )
    method: str = option(
        "gptq", "How codes are found once schemes are chosen.", choices=("gptq", "scale_search", "rtn")
    )
    rounds: int = option(2, "Rounds of descent after gptq.", low=0, high=50)
    epochs: int = option(
        0, "Times that tokens are gone through to learn from the logits after gptq.", high=50
    )
    work: float = option(20.0, "Most multiply-adds of that, in million millions.", low=0, high=1e6)
    tokens: int = option(512, "Calibration tokens on which influence is measured.", low=32, high=4096)
    min_rows: int = option(8, "Matrices with fewer rows than this are kept.", low=1)
    skip: str = option("", "Weights to keep: name patterns such as *.down_proj.weight, separated by commas.")
    expect: int = expect_option()

    def __post_init__(self) -> None:
        """Raises RecipeError for schemes that are none, and for learning that no method comes before."""
        parse_forms(self.schemes, "mixed_precision.schemes")
        if self.epochs and self.method != "gptq":
            raise RecipeError(
                "mixed_precision.epochs",
                f"Learning from the logits does not follow the method {self.method!r}.",
                "It starts from codes that gptq found.",
                "Set mixed_precision.method=gptq, or mixed_precision.epochs=0.",
            )

    @property
    def tuning(self) -> Tuning | None:
        """What follows once all weights have codes."""
        return Tuning(epochs=self.epochs, work=self.work) if self.epochs else None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight that is rounded; decisions say what each scheme would have changed.

        Each scheme of each weight takes its codes by the method, and one run over `tokens` tokens, from that
        weight on. When only planning, larger codes are taken to be better everywhere alike, and
        the whole budget is spent. Raises
        RecipeError for a budget below what the smallest schemes take.
        """
        graph = program.copy_graph()
        eligible = _Eligible(min_rows=self.min_rows, skip=self.skip).choices(graph, program)
        units = units_of(graph, program, eligible, parse_forms(self.schemes, "mixed_precision.schemes"))
        room = _room(program, units)
        budget = self._bits(room, units)
        if context.planning:
            losses, cost = _planned(units), "planned by size alone"
        else:
            calibration = require_calibration(self.name, context, *SEARCH_NEEDS)
            sensitivity = Sensitivity(program, judged_pieces(calibration, self.tokens))
            data = calibration if self.method != "rtn" else None
            losses = measure_influence(program, units, sensitivity, _TRIALS[self.method], data)
            cost = f"measured by {sum(map(len, losses))} runs over {sensitivity.num_tokens} tokens"
        sizes = [[form.num_bytes for form in unit.forms] for unit in units]
        enough = 0.0 if context.planning else self.enough
        chosen = assign(sizes, losses, room.capacity(budget), enough=enough)
        choices = dict(eligible)
        for unit, index, lost in zip(units, chosen.options, losses, strict=True):
            choices |= _chosen(unit, index, lost, eligible, context.planning)
        done = run_choices(self.name, choices, program, context, self._method(), data=self.method != "rtn")
        whole = _decision(room, units, chosen, budget, cost)
        report = replace(done.report, decisions=(whole, *done.report.decisions))
        return PassResult(program=done.program, report=report)

    def _method(self) -> Method:
        if self.method != "gptq":
            return _TRIALS[self.method]
        return Method(propagate=True, rounds=self.rounds, catch_up=1.0, tuning=self.tuning)

    def _bits(self, room: _Room, units: Sequence[Unit]) -> float:
        """The bits of a weight to keep to."""
        low, high = _reach(room, units)
        if not self.budget:
            return high
        if room.capacity(self.budget) < sum(min(form.num_bytes for form in unit.forms) for unit in units):
            raise RecipeError(
                "mixed_precision.budget",
                f"A budget of {self.budget:g} bits per weight cannot be kept.",
                f"With the schemes {self.schemes} this model takes {low:.3f} to {high:.3f} bits per weight, "
                "scales and weights that are kept included.",
                f"Set mixed_precision.budget to at least {low + 0.0005:.3f}, or list smaller schemes in "
                "mixed_precision.schemes.",
            )
        return self.budget


def _decision(room: _Room, units: Sequence[Unit], chosen: Assignment, limit: float, cost: str) -> Decision:
    used = sum(unit.forms[index].num_bytes for unit, index in zip(units, chosen.options, strict=True))
    low, high = _reach(room, units)
    kind = "the least sum of divergences" if chosen.exact else f"sizes rounded up to {chosen.step} bytes"
    return Decision(
        subject="budget",
        choice=f"{room.bits(used):.3f} bits per weight",
        reason=f"within {limit:.4g}; reachable {low:.3f} to {high:.3f}; {kind}; {cost}",
    )


def _room(program: Program, units: Sequence[Unit]) -> _Room:
    mine = {name for unit in units for name in unit.names}
    used = list(program.used_weights())
    fixed = sum(program.weights.num_bytes(name) for name in used if name not in mine)
    return _Room(fixed, sum(num_parameters(program.weights[name]) for name in used))


def _reach(room: _Room, units: Sequence[Unit]) -> tuple[float, float]:
    sizes = [[form.num_bytes for form in unit.forms] for unit in units]
    return room.bits(sum(map(min, sizes))), room.bits(sum(map(max, sizes)))


def _planned(units: Sequence[Unit]) -> list[list[float]]:
    """Squared rounding errors as they fall with bits, for weights that are all alike."""
    return [
        [unit.num_parameters * 4.0 ** (-8 * form.num_bytes / unit.num_parameters) for form in unit.forms]
        for unit in units
    ]


def _chosen(
    unit: Unit, index: int, lost: Sequence[float], eligible: Mapping[str, Choice], planning: bool
) -> dict[str, Choice]:
    form = unit.forms[index]
    tried = [
        f"{other.label} ({8 * other.num_bytes / unit.num_parameters:.2f} bits) {loss:.2e}"
        for other, loss in zip(unit.forms, lost, strict=True)
    ]
    note = "planned by size" if planning else f"nats of divergence alone: {', '.join(tried)}"
    return {
        name: Choice(scheme, eligible[name].role, f"{eligible[name].role.value}; {note}")
        for name, scheme in zip(unit.names, form.schemes, strict=True)
    }
