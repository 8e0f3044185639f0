"""What a failure looks like: three lines on stderr or one object on stdout, and an exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..spec.errors import InternalError, LlmcError, TargetError, UsageError

INTERRUPTED = 130
_COMPILE_TIME = ("torch", "transformers", "huggingface_hub")


def run_guarded(run: Callable[[], Any], arguments: Sequence[str]) -> int:
    """The exit code of `run`: what it returns when that is an integer, 0 otherwise, or that of its failure,
    which is printed."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        result = run()
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # nobody reads it any more, and closing it would fail again
        return 1
    except click.ClickException as error:
        return _report(_usage(error), as_json, debug)
    except LlmcError as error:
        return _report(error, as_json, debug)
    except Exception as error:  # noqa: BLE001 - the last place where a defect can become a message
        return _report(explain(error), as_json, debug, cause=error)
    return result if isinstance(result, int) else 0


def explain(error: Exception) -> LlmcError:
    """What a user is told about an error that no part of llmc foresaw."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _COMPILE_TIME:
        return TargetError(
            "target.no_compiler",
            "This installation of llmc can run artifacts, not compile models.",
            f"Compiling needs {error.name}, which is not installed.",
            "Install it with `pip install 'llmc-compiler[compile]'`.",
        )
    if isinstance(error, MemoryError):
        return TargetError(
            "target.memory",
            "There is not enough memory.",
            "An allocation failed; nothing was written.",
            "Close other programs, or use a machine with more memory.",
        )
    if isinstance(error, OSError):
        return TargetError(
            "target.os",
            f"The operating system refused: {error.strerror or error}.",
            f"It was about {error.filename!r}." if error.filename else "It named no file.",
            "Check that the path exists and that you may read or write it.",
        )
    return InternalError(
        "internal.unexpected",
        "llmc failed in a way that it should not.",
        f"{type(error).__name__}: {error}",
        "Run the command again with --debug and report what it prints.",
    )


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "llmc"
    return UsageError(
        "usage.arguments",
        error.format_message(),
        f"`{command}` cannot be called like this.",
        f"`{command} --help` lists its arguments.",
    )


def _report(error: LlmcError, as_json: bool, debug: bool, cause: Exception | None = None) -> int:
    if debug:
        traceback.print_exception(cause or error)
    if as_json:
        click.echo(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
    else:
        for line in (f"Error: {error.what}", error.why, error.fix):
            click.echo(line, err=True)
    return error.exit_code
