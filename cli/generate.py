"""`llmc generate`: text from an artifact, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..spec.errors import UsageError
from .output import Output, with_output

if TYPE_CHECKING:
    from ..runtime.params import SamplingParams


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("stdin", required=False, metavar="[-]")
@click.option("--draft", type=click.Path(path_type=Path), help="An artifact that drafts: same text, sooner.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be given several times.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file that holds one prompt; a newline at its end is left out.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--max-tokens", type=int, metavar="N", help="Most tokens to generate.")
@click.option("--temperature", type=float, metavar="X", help="0 is greedy.")
@click.option("--top-p", type=float, metavar="X", help="Keep the likeliest tokens of this total.")
@click.option("--top-k", type=int, metavar="N", help="Keep the N likeliest tokens; 0 keeps all.")
@click.option("--min-p", type=float, metavar="X", help="Drop tokens below X times the likeliest.")
@click.option("--repetition-penalty", type=float, metavar="X", help="Above 1 discourages repetition.")
@click.option(
    "--presence-penalty", type=float, metavar="X", help="Subtracted once from tokens in the output."
)
@click.option("--frequency-penalty", type=float, metavar="X", help="Subtracted for each time in the output.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Do not end at the model's end token.")
@click.option("--seed", type=int, metavar="N", help="The same seed gives the same text.")
@with_output
def generate(
    output: Output,
    artifact: Path,
    stdin: str | None,
    draft: Path | None,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    chat: bool,
    **sampling: Any,
) -> None:
    """Generate from ARTIFACT. The prompt is --prompt, --prompt-file, or `-` for standard input.

    What is not given of the sampling options is as the model's own defaults say, or greedy.
    """
    from .generation import generate_all, generate_streaming, open_model

    texts = [*prompts, *map(read_prompt, files)]
    if stdin is not None:
        texts.append(_read_stdin(stdin))
    if not texts:
        raise UsageError(
            "usage.no_prompt",
            "There is no prompt.",
            "Text is generated from --prompt TEXT, --prompt-file FILE, or - for standard input.",
            'Add for example --prompt "Once upon a time".',
        )
    with open_model(artifact, draft) as opened:
        params = with_options(opened.llm.default_params(), sampling)
        if output.as_json or len(texts) > 1:
            generate_all(output, opened, texts, params, chat=chat)
        else:
            generate_streaming(output, opened, texts[0], params, chat=chat)


def with_options(defaults: SamplingParams, options: dict[str, Any]) -> SamplingParams:
    """`defaults` with the options that were given. RequestError for a value out of range."""
    from dataclasses import replace

    given = {name: value for name, value in options.items() if value not in (None, ())}
    return replace(defaults, **given)


def read_prompt(path: Path) -> str:
    """The text of a prompt file without a newline at its end. UsageError when it cannot be read."""
    try:
        return _without_newline(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "usage.prompt_file",
            f"The prompt file {path} cannot be read.",
            f"{error}.",
            "Name a UTF-8 text file.",
        ) from error


def _read_stdin(argument: str) -> str:
    if argument != "-":
        raise UsageError(
            "usage.prompt",
            f"The argument {argument!r} is not understood.",
            "A prompt in words is given with --prompt; only - may stand alone, for standard input.",
            f"Write --prompt {argument!r}.",
        )
    return _without_newline(sys.stdin.read())


def _without_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
