"""What the pass pipeline did to a program, as data. No clock, path or host may enter here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One choice a pass took about one node or weight, and why."""

    subject: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How much of one layer's output a pass lost: squared error over squared output on the calibration
    tokens (over the weights alone where there were none), and what rounding to nearest loses there.
    """

    subject: str
    error: float
    nearest_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """The trace one pass leaves in `Program.history` and in the artifact.

    `divergence` is the largest absolute logit difference on the probe batch against the program
    before the pass (None when not measured); `misses` are reasons why near-matches did not apply.
    """

    name: str
    options: dict[str, bool | int | float | str]
    nodes_before: int
    nodes_after: int
    matches: int
    divergence: float | None = None
    decisions: tuple[Decision, ...] = ()
    misses: tuple[str, ...] = field(default=())
    errors: tuple[LayerError, ...] = ()


def is_invariant(history: Sequence[PassRecord]) -> bool:
    """Whether the bits of a row of any product depend on nothing but the row, as `select_kernels` was told;
    so it is where that pass did not run."""
    return all(record.options.get("invariant", True) for record in history if record.name == "select_kernels")
