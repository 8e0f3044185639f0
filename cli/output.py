"""Where a command's words go: results to stdout, everything else to stderr. Knows no command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Output:
    """The three options every command has. With `as_json` stdout gets one object and nothing else;
    `quiet` silences what is neither a result nor an error."""

    as_json: bool = False
    quiet: bool = False
    debug: bool = False

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """The outcome of a command, as the one JSON object or as text for a reader."""
        click.echo(json.dumps(data, ensure_ascii=False, default=str) if self.as_json else text)

    def note(self, message: str) -> None:
        """A remark on stderr."""
        if not self.quiet:
            click.echo(message, err=True)

    def console(self) -> Console:
        """A rich console on stderr."""
        from rich.console import Console

        return Console(file=sys.stderr, quiet=self.quiet, highlight=False)


def with_output(command: Command) -> Command:
    """Give `command` the options --json, --quiet and --debug, and an `Output` as its first argument."""

    def run(as_json: bool, quiet: bool, debug: bool, **values: Any) -> Any:
        return command(Output(as_json, quiet, debug), **values)

    wrapped: Any = update_wrapper(run, command)
    wrapped = click.option("--debug", is_flag=True, help="Print a traceback with errors.")(wrapped)
    wrapped = click.option("--quiet", is_flag=True, help="Print results and errors only.")(wrapped)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(wrapped)


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Rows of text in left-aligned columns two spaces apart."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def human_bytes(count: float) -> str:
    """A size as people read it, such as 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
