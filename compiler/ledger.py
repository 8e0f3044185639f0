"""How long each stage of a compile took, from start to end, and who is told about it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Told about stages as they begin and end, and about the work inside of one."""

    def begin(self, stage: str) -> None:
        """A stage has begun."""
        ...

    def advance(self, done: int, total: int, what: str) -> None:
        """`done` of `total` units (bytes, or steps) of the current stage are behind us; `what` is next."""
        ...

    def end(self, stage: str, seconds: float) -> None:
        """The stage is over."""
        ...


class Silent:
    """A `Progress` that nobody sees."""

    def begin(self, stage: str) -> None:
        """Nothing."""

    def advance(self, done: int, total: int, what: str) -> None:
        """Nothing."""

    def end(self, stage: str, seconds: float) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """One line of the ledger."""

    stage: str
    seconds: float
    note: str = ""


@dataclass(slots=True)
class StageLine:
    """A stage while it runs: `note` says how it went, for example what came from a cache."""

    note: str = ""


class Ledger:
    """Stages in the order they ran, with their seconds by the clock given (seconds, monotonic)."""

    def __init__(self, clock: Callable[[], float], progress: Progress) -> None:
        self.stages: list[StageTime] = []
        self.progress = progress
        self.clock = clock
        self._started = clock()

    @contextmanager
    def stage(self, name: str) -> Generator[StageLine]:
        """Times a block as the stage `name`. A block that raises leaves no line."""
        self.progress.begin(name)
        started = self.clock()
        line = StageLine()
        yield line
        seconds = self.clock() - started
        self.stages.append(StageTime(name, seconds, line.note))
        self.progress.end(f"{name} ({line.note})" if line.note else name, seconds)

    @property
    def total_seconds(self) -> float:
        """Seconds since the ledger was opened."""
        return self.clock() - self._started
