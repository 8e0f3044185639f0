"""8 bits for the few linears whose rounding changes the output most, within a share of the model's size.

Scales of 8-bit tables may be given up for more of it. Influence is measured, and the choice within the share
is exact. Finds no codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...ir.program import Program
from ...spec.history import Decision
from ...spec.quant import QuantScheme
from ..base import PassContext
from ..bits import coded_bytes, num_parameters
from .influence import TRIAL, measure_influence
from .knapsack import assign
from .needs import SEARCH_NEEDS, require_calibration
from .replace import Role
from .selection import Choice
from .sensitivity import Sensitivity, judged_pieces
from .units import Unit, units_of

_LIFTED = QuantScheme(bits=8, group_size=128)
_TABLES = (Role.embedding, Role.head, Role.tied)
# Calibration tokens on which influence is measured.
_TOKENS = 512


class Lift(NamedTuple):
    """By what part of its size a model may grow, and how many million million multiply-adds may be spent on
    finding where."""

    share: float
    work: float


class Lifted(NamedTuple):
    """Choices, and what is to be said about them."""

    choices: dict[str, Choice]
    decision: Decision


def lift_choices(
    name: str,
    program: Program,
    choices: Mapping[str, Choice],
    scheme: QuantScheme,
    lift: Lift,
    context: PassContext,
) -> Lifted:
    """`choices` of pass `name` with 8 bits instead of `scheme` for the linears that this helps most.

    Each linear is rounded alone, as chosen and to 8 bits, and the divergence of the output measured: a run of
    what stands behind it for each. A model for which that takes too much work is left as it is, and so is any
    when only planning: the plan is the least that it will take.
    """
    linears = {
        own: choice
        for own, choice in choices.items()
        if choice.role is Role.linear and choice.scheme is not None and choice.scheme.bits < _LIFTED.bits
    }
    if not linears:
        return _as_chosen(choices, f"no linear has fewer than {_LIFTED.bits} bits")
    size = sum(num_parameters(program.weights[own]) for own in program.used_weights())
    work = len(linears) / 2 * _TOKENS * size
    if work > lift.work * 1e12:
        why = f"{work / 1e12:.3g} million million products are more than {lift.work:g}"
        return _as_chosen(choices, why)
    if context.planning:
        return _as_chosen(choices, f"tokens decide: up to {lift.share:.2%} more bytes")
    units = _units(program, choices, linears, scheme)
    losses = _losses(name, program, units, context)
    total = _stored_bytes(program, choices)
    sizes = [[form.num_bytes for form in unit.forms] for unit in units]
    capacity = sum(own[0] for own in sizes) + int(lift.share * total)
    chosen = assign(sizes, losses, capacity).options
    found = dict(choices)
    for unit, index, lost in zip(units, chosen, losses, strict=True):
        found |= _chosen(unit, index, lost, choices)
    return Lifted(found, _decision(units, chosen, losses, lift.share, total))


def _as_chosen(choices: Mapping[str, Choice], why: str) -> Lifted:
    return Lifted(dict(choices), Decision(subject="lift", choice="none", reason=why))


def _units(
    program: Program, choices: Mapping[str, Choice], linears: Mapping[str, Choice], scheme: QuantScheme
) -> list[Unit]:
    """What there is to choose for: forms of each begin with what is chosen already."""
    graph = program.copy_graph()
    units = units_of(graph, program, linears, {scheme.name: scheme, _LIFTED.name: _LIFTED})
    for own, choice in choices.items():
        eight = choice.scheme
        if choice.role in _TABLES and eight is not None and eight.bits == _LIFTED.bits:
            units += units_of(graph, program, {own: choice}, {eight.name: eight, _LIFTED.name: _LIFTED})
    return units


def _losses(
    name: str, program: Program, units: Sequence[Unit], context: PassContext
) -> Sequence[Sequence[float]]:
    calibration = require_calibration(name, context, *SEARCH_NEEDS)
    sensitivity = Sensitivity(program, judged_pieces(calibration, _TOKENS))
    return measure_influence(program, units, sensitivity, TRIAL, calibration)


def _stored_bytes(program: Program, choices: Mapping[str, Choice]) -> int:
    """Bytes of all weights, rounded as chosen."""
    schemes = {name: choice.scheme for name, choice in choices.items()}
    return sum(
        program.weights.num_bytes(name)
        if (scheme := schemes.get(name)) is None
        else coded_bytes(program.weights[name].shape, scheme)
        for name in program.used_weights()
    )


def _chosen(
    unit: Unit, index: int, lost: Sequence[float], choices: Mapping[str, Choice]
) -> dict[str, Choice]:
    tried = [f"{form.label} {loss:.2e}" for form, loss in zip(unit.forms, lost, strict=True)]
    note = f"nats of divergence alone: {', '.join(tried)}"
    return {
        name: Choice(scheme, choices[name].role, f"{choices[name].reason}; {note}")
        for name, scheme in zip(unit.names, unit.forms[index].schemes, strict=True)
    }


def _decision(
    units: Sequence[Unit],
    chosen: Sequence[int],
    losses: Sequence[Sequence[float]],
    share: float,
    total: int,
) -> Decision:
    picked = list(zip(units, chosen, losses, strict=True))
    grown = sum(unit.forms[index].num_bytes - unit.forms[0].num_bytes for unit, index, _ in picked)
    linears = [index for unit, index, _ in picked if _bits(unit) < _LIFTED.bits]
    before, after = sum(lost[0] for _, _, lost in picked), sum(lost[index] for _, index, lost in picked)
    gain = f"divergences alone add up to {after:.3g} nats, not {before:.3g}"
    return Decision(
        subject="lift",
        choice=f"{sum(index > 0 for index in linears)} of {len(linears)} linears at 8 bits",
        reason=f"{grown / total:.2%} more bytes, within {share:.2%}; {gain}",
    )


def _bits(unit: Unit) -> int:
    """Of what is chosen already."""
    scheme = unit.forms[0].schemes[0]
    assert scheme is not None
    return scheme.bits
