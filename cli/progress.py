"""A compile's progress on stderr: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .output import Output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

_NARROWEST = 0.05  # seconds; shorter stages are not worth a line


class PlainProgress:
    """One line per finished stage."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def begin(self, stage: str) -> None:
        """Nothing until it is over."""

    def advance(self, done: int, total: int, what: str) -> None:
        """Nothing: lines that overwrite each other need a terminal."""

    def end(self, stage: str, seconds: float) -> None:
        """The line."""
        if seconds >= _NARROWEST:
            self._output.note(f"{seconds:8.1f} s  {stage}")


class BarProgress:
    """A bar for the current stage, a line for each that is over."""

    def __init__(self, console: Console, bar: RichBar) -> None:
        self._console = console
        self._bar = bar
        self._task: TaskID | None = None

    def begin(self, stage: str) -> None:
        """Show the stage as running."""
        self._task = self._bar.add_task(stage, total=None)

    def advance(self, done: int, total: int, what: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def end(self, stage: str, seconds: float) -> None:
        """Replace the bar by a line."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if seconds >= _NARROWEST:
            self._console.print(f"{seconds:8.1f} s  {stage}")


@contextmanager
def shown_progress(output: Output) -> Generator[PlainProgress | BarProgress]:
    """A `compiler.ledger.Progress` for as long as the block runs."""
    console = output.console()
    if output.quiet or not console.is_terminal:
        yield PlainProgress(output)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("          {task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield BarProgress(console, bar)
