"""What a pass is: options as fields, facts required and provided, a numeric contract, a report.

Knows nothing of order, time, files or any single pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch

from ..ir.program import Program
from ..spec.history import Decision, LayerError
from ..spec.target import REFERENCE, Target
from .calibration import Calibration

OptionValue = bool | int | float | str
Value = TypeVar("Value", bool, int, float, str)

# Facts of a Program. A pass names those it needs and those it establishes.
TRACED = "traced"
CANONICAL = "canonical"
QUANTIZED = "quantized"
KV_LAYOUT = "kv_layout"
PAGED = "paged"
PLANNED = "planned"


class Stage(IntEnum):
    """The stages of a pipeline; a recipe lists its passes in this order."""

    canonicalise = 1
    fuse = 2
    quantise = 3
    layout = 4
    plan = 5


@dataclass(frozen=True, slots=True)
class Exact:
    """The pass changes no bit of the logits."""


@dataclass(frozen=True, slots=True)
class Within:
    """The pass may reorder roundings: `max|a - b| <= tolerance * max|a|` for logits in float32.

    In another compute dtype the tolerance grows with its machine epsilon, since so does each rounding.
    """

    tolerance: float

    def bound(self, compute_dtype: str) -> float:
        """The relative difference allowed for a program computed in `compute_dtype`."""
        ratio = torch.finfo(getattr(torch, compute_dtype)).eps / torch.finfo(torch.float32).eps
        return self.tolerance * ratio


@dataclass(frozen=True, slots=True)
class Lossy:
    """The pass trades accuracy for something; the loss is measured and recorded."""


Contract = Exact | Within | Lossy


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What every pass of one compile may look at, apart from the program and its own options.

    `max_tokens` and `max_rows` bound one step (tokens in it, sequences in it); `max_model_len` bounds
    one sequence in tokens. `seed` feeds whatever a pass draws at random. `calibration` is where passes that
    compute weights keep them, with tokens when a pass of the recipe `needs_calibration`. With `planning` no
    weight may be evaluated: what a pass would compute from data is left as rounding to nearest, of the
    same form and size.
    """

    target: Target = REFERENCE
    max_tokens: int = 512
    max_rows: int = 32
    max_model_len: int = 4096
    seed: int = 0
    calibration: Calibration | None = None
    planning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What a pass did: regions rewritten, choices taken, and why near-matches were left alone.

    `errors` say what layers lost, where the pass measured it. `contract` replaces the class's where the
    run was held to another one, for example because an option or a dtype of the program turned an exact
    rewrite into a lossy one.
    """

    matches: int = 0
    decisions: tuple[Decision, ...] = ()
    misses: tuple[str, ...] = ()
    errors: tuple[LayerError, ...] = ()
    contract: Contract | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """The new program and the report on it."""

    program: Program
    report: PassReport


@runtime_checkable
class Pass(Protocol):
    """One rewrite of a Program. Implementations are `@dataclass(frozen=True, slots=True, kw_only=True)`.

    Fields are the options, made with `option`; every pass has at least `expect`, made with
    `expect_option`. `run` must not change the program it is given (edit `program.copy_graph()`), may leave
    `meta["val"]` of new nodes empty, and neither logs, times, dumps nor writes files.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    requires: ClassVar[frozenset[str]]
    provides: ClassVar[frozenset[str]]
    contract: ClassVar[Contract]

    @property
    def expect(self) -> int:
        """Fewest matches the recipe counts on; fewer is an error."""
        ...

    def run(self, program: Program, context: PassContext) -> PassResult:
        """The rewritten program and a report. Facts and history are the manager's to add."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """What a user may know about one option of a pass.

    `low`, `high` (inclusive) and `choices` bound legal values; `search` lists the values that a search
    over recipes may try, empty when the option is not worth searching, on the kinds of targets that
    `search_on` names (all where it is empty).
    """

    name: str
    kind: type
    default: OptionValue
    doc: str
    choices: tuple[OptionValue, ...] = ()
    low: float | None = None
    high: float | None = None
    search: tuple[OptionValue, ...] = ()
    search_on: tuple[str, ...] = ()


def option(
    default: Value,
    doc: str,
    *,
    choices: tuple[Value, ...] = (),
    low: float | None = None,
    high: float | None = None,
    search: tuple[Value, ...] = (),
    search_on: tuple[str, ...] = (),
) -> Value:
    """A dataclass field that is a pass option; its type is that of `default`."""
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high}
    metadata |= {"search": search, "search_on": search_on}
    made: Any = field(default=default, metadata=metadata)
    return made


def expect_option(default: int = 0) -> int:
    """The option that every pass has: how many matches there must be."""
    return option(default, "Fewest matches there must be; fewer is an error.", low=0)


def options_of(kind: type[Pass]) -> tuple[OptionInfo, ...]:
    """The options of a pass class, in the order of its fields."""
    found: list[OptionInfo] = []
    for entry in fields(kind):  # pyright: ignore[reportArgumentType]
        default: Any = entry.default
        found.append(OptionInfo(name=entry.name, kind=type(default), default=default, **entry.metadata))
    return tuple(found)


def option_values(pass_: Pass) -> dict[str, OptionValue]:
    """The options of one pass instance by name."""
    return {info.name: getattr(pass_, info.name) for info in options_of(type(pass_))}


def needs_calibration(pass_: Pass) -> bool:
    """Whether a pass looks at activations: it has a true attribute `calibrated`."""
    return bool(getattr(pass_, "calibrated", False))
