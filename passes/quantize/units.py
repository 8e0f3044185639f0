"""Weights that get their scheme together, and what each scheme that they may have stores.

A weight is a unit of its own, but for the two stacks of one mixture of experts. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ...ir.program import Program
from ...spec.errors import RecipeError
from ...spec.quant import QuantScheme, parse_scheme
from ..bits import coded_bytes, num_parameters
from ..graph import argument, calls
from .replace import MOE, Role
from .selection import Choice

KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Form:
    """One way to store a unit: what the recipe calls it, the scheme of each weight (None: as it is), and the
    bytes of all."""

    label: str
    schemes: tuple[QuantScheme | None, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights by name, whether they are read by linears alone, the parameters they hold, and their forms."""

    names: tuple[str, ...]
    is_linear: bool
    num_parameters: int
    forms: tuple[Form, ...]


def parse_forms(text: str, option: str) -> dict[str, QuantScheme | None]:
    """The schemes that `text` lists, by name, separated by commas; `keep` leaves a weight as it is. `option`
    names the text in errors.

    Raises RecipeError for an empty list, a name that is no scheme, and one whose codes are no integers.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = {name: None if name == KEEP else parse_scheme(name) for name in names}
    if not found:
        raise RecipeError(
            option,
            "There is no scheme to choose from.",
            f"The option {option} is empty.",
            f"List schemes, for example {option}=int4_g128,int4_g32,int8_g32.",
        )
    for name, scheme in found.items():
        if scheme is not None and (scheme.code_type != "int" or scheme.block_rows):
            raise RecipeError(
                option,
                f"Scheme {name!r} cannot be chosen.",
                "Codes are searched for on grids of integers with a scale a row or group.",
                f"List schemes such as int4_g32, int8_channel or {KEEP} in {option}.",
            )
    return found


def units_of(
    graph: fx.Graph,
    program: Program,
    choices: Mapping[str, Choice],
    listed: Mapping[str, QuantScheme | None],
) -> list[Unit]:
    """The units among the weights that `choices` rounds, in order, with a form for each scheme listed."""
    partner: dict[str, str] = {}
    for moe in calls(graph, MOE):
        first, second = (str(argument(moe, part).target) for part in ("gate_up", "down"))
        partner |= {first: second, second: first}
    units: list[Unit] = []
    taken: set[str] = set()
    for name, choice in choices.items():
        if choice.scheme is None or name in taken:
            continue
        names = (name, partner[name]) if name in partner else (name,)
        taken.update(names)
        count = sum(num_parameters(program.weights[own]) for own in names)
        linear = choice.role in (Role.linear, Role.head)
        units.append(Unit(names, linear, count, _forms(program, names, listed)))
    return units


def _forms(
    program: Program, names: Sequence[str], listed: Mapping[str, QuantScheme | None]
) -> tuple[Form, ...]:
    """Forms that are the same for these shapes are one."""
    found: dict[tuple[QuantScheme | None, ...], Form] = {}
    for label, scheme in listed.items():
        schemes = tuple(_fitted(scheme, program.weights[name].shape[-1]) for name in names)
        size = sum(
            program.weights.num_bytes(name) if own is None else coded_bytes(program.weights[name].shape, own)
            for name, own in zip(names, schemes, strict=True)
        )
        found.setdefault(schemes, Form(label, schemes, size))
    return tuple(found.values())


def _fitted(scheme: QuantScheme | None, width: int) -> QuantScheme | None:
    """`scheme`, with one scale a row where a row is no longer than a group."""
    if scheme is None or width > scheme.group_size:
        return scheme
    return replace(scheme, group_size=0)
