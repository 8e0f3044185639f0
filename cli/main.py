"""The `llmc` command: its subcommands by name, and the one place where errors become text and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__
from .bench import bench
from .bisect import bisect
from .cache import cache
from .compare import compare
from .compile import compile_command
from .doctor import doctor
from .eval import evaluate
from .export import export
from .failures import run_guarded
from .generate import generate
from .inspect import inspect
from .models import models
from .passes import passes
from .recipe import recipe
from .retarget import retarget
from .serve import serve
from .targets import targets
from .verify import verify


class CommandLine(click.Group):
    """A group whose failures are three lines and an exit code, or one JSON object."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit: 0 done, 1 a check said no, 2 wrong use, 3 bad model, artifact or data,
        4 not possible on this machine, 130 interrupted."""
        arguments = list(sys.argv[1:] if args is None else args)

        def run() -> Any:
            return super(CommandLine, self).main(
                arguments, prog_name or "llmc", complete_var, standalone_mode=False, **extra
            )

        sys.exit(run_guarded(run, arguments))


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmc", message="%(prog)s %(version)s")
def main() -> None:
    """Compile Hugging Face language models ahead of time, and run what was compiled.

    Every command takes --json (one object on stdout), --quiet and --debug.
    """


_COMMANDS = (
    compile_command,
    cache,
    compare,
    evaluate,
    bisect,
    generate,
    serve,
    bench,
    verify,
    inspect,
    export,
    retarget,
    passes,
    recipe,
    targets,
    models,
    doctor,
)
for _command in _COMMANDS:
    main.add_command(_command)
