"""Targets as frozen data: what a machine family offers, never how it is programmed."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import TargetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where an artifact runs. `kind` selects the backend and the executor.

    `levels` are ISA levels (cpu) or architectures (cuda); `page_tokens` is the default KV page.
    """

    kind: str
    levels: tuple[str, ...] = ()
    device: str = "cpu"
    page_tokens: int = 32
    features: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """The target as the command line spells it."""
        return f"{self.kind}:{','.join(self.levels)}" if self.levels else self.kind


REFERENCE = Target(kind="reference")

CPU = Target(kind="cpu")

KNOWN: dict[str, Target] = {"cpu": CPU, "reference": REFERENCE}


def parse_target(text: str) -> Target:
    """The target called `text`. Raises TargetError naming those that exist."""
    if text in KNOWN:
        return KNOWN[text]
    raise TargetError(
        "target.unknown",
        f"There is no target {text!r}.",
        f"This version of llmc generates code for: {', '.join(KNOWN)}.",
        "Choose one of these with --target; `llmc targets` says what each needs.",
    )
