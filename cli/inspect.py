"""`llmc inspect`: what is inside an artifact, or a model, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..spec.errors import UsageError
from .output import Output, with_output

if TYPE_CHECKING:
    from .inspection import Description


@click.command()
@click.argument("path", metavar="ARTIFACT|MODEL")
@click.option("--graph", is_flag=True, help="Draw the program as SVG, layers folded, to -o.")
@click.option(
    "-o", "--output", "picture", type=click.Path(path_type=Path), metavar="FILE", help="With --graph."
)
@click.option("--program", is_flag=True, help="Print the final program as text.")
@click.option("--kernels", is_flag=True, help="Say which kernel each node runs, and which lost.")
@click.option("--bytes", "sizes", is_flag=True, help="Say where the bytes are, on the disk and in memory.")
@click.option("--pass", "pass_name", metavar="NAME", help="Say what one pass did, and what it left alone.")
@click.option("--fit", is_flag=True, help="Say what fits into --memory at --context tokens a request.")
@click.option(
    "--memory", metavar="BYTES", help="With --fit: bytes, or a number with K, M, G (default: free)."
)
@click.option("--context", type=int, metavar="N", help="With --fit: tokens a request (default: the model's).")
@click.option("--quant", metavar="PRESET", help="With --fit of a model: how it would be quantised.")
@click.option("--kv-dtype", metavar="D", help="With --fit of a model: what its cache would be kept in.")
@click.option("--target", metavar="T", help="With --fit of a model: what it would be compiled for.")
@click.option("--dtype", metavar="D", help="With --fit of a model: what it would compute in.")
@click.option("--why", is_flag=True, help="Say what was fused and what not, and which choices were taken.")
@click.option(
    "--against", type=click.Path(path_type=Path), help="Say which inputs differ from this artifact's."
)
@click.option("--trace", is_flag=True, help="Say what each layer computes and how far off it is.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="With --trace: a text to run.")
@click.option("--reference", metavar="MODEL", help="With --trace: the model that errors are measured to.")
@click.option("--bound", default=0.25, show_default=True, help="With --trace: the relative error allowed.")
@with_output
def inspect(output: Output, path: str, **options: Any) -> None:
    """Say what ARTIFACT or MODEL is made of, and why; one question at a time."""
    from ..artifact.reader import is_artifact

    asked = Asked(**options)
    artifact = Path(path)
    if is_artifact(artifact):
        data, text = _about_artifact(artifact, asked)
    else:
        data, text = _about_model(path, asked)
    output.result(data, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of the command."""

    graph: bool
    picture: Path | None
    program: bool
    kernels: bool
    sizes: bool
    pass_name: str | None
    fit: bool
    memory: str | None
    context: int | None
    quant: str | None
    kv_dtype: str | None
    target: str | None
    dtype: str | None
    why: bool
    against: Path | None
    trace: bool
    prompts: tuple[str, ...]
    reference: str | None
    bound: float

    def question(self) -> str:
        """What is asked, by its option; "" for a summary. UsageError for several, which one command does not
        answer, and for options of another question."""
        flags = {
            "--graph": self.graph,
            "--program": self.program,
            "--kernels": self.kernels,
            "--bytes": self.sizes,
            "--pass": self.pass_name is not None,
            "--fit": self.fit,
            "--why": self.why,
            "--against": self.against is not None,
            "--trace": self.trace,
        }
        asked = [name for name, is_asked in flags.items() if is_asked]
        if len(asked) > 1:
            raise UsageError(
                "usage.questions",
                f"{' and '.join(asked)} were asked at once.",
                "Each is a question of its own, with an answer of its own.",
                "Ask one after the other.",
            )
        question = asked[0] if asked else ""
        for owner, name, value in self._details():
            if value and owner != question:
                raise UsageError(
                    "usage.question_missing",
                    f"{name} was given without {owner}.",
                    f"It says something about {owner}, and would be ignored.",
                    f"Add {owner}, or leave {name} out.",
                )
        return question

    def _details(self) -> list[tuple[str, str, object]]:
        return [
            ("--graph", "-o", self.picture),
            *(("--fit", name, value) for name, value in self.fit_details().items()),
            ("--fit", "--memory", self.memory),
            ("--fit", "--context", self.context),
            ("--trace", "--prompt", self.prompts),
            ("--trace", "--reference", self.reference),
        ]

    def fit_details(self) -> dict[str, str | None]:
        """How a model would be compiled, by option."""
        return {
            "--quant": self.quant,
            "--kv-dtype": self.kv_dtype,
            "--target": self.target,
            "--dtype": self.dtype,
        }


def _about_artifact(path: Path, asked: Asked) -> Description:
    from . import explaining, inspection

    answers: dict[str, Callable[[], Description]] = {
        "": lambda: inspection.describe_artifact(path),
        "--graph": lambda: explaining.draw_program(path, asked.picture or Path(f"{path.stem}.svg")),
        "--program": lambda: inspection.program_text(path),
        "--kernels": lambda: explaining.describe_kernels(path),
        "--bytes": lambda: explaining.describe_bytes(path),
        "--pass": lambda: inspection.describe_pass(path, asked.pass_name or ""),
        "--fit": lambda: _fit_of_artifact(path, asked),
        "--why": lambda: explaining.describe_reasons(path),
        "--against": lambda: explaining.describe_changes(path, asked.against or path),
        "--trace": lambda: explaining.describe_trace(path, asked.prompts, asked.reference, asked.bound),
    }
    return answers[asked.question()]()


def _fit_of_artifact(path: Path, asked: Asked) -> Description:
    from . import inspection

    for name, value in asked.fit_details().items():
        if value is not None:
            raise UsageError(
                "usage.fit_settings",
                f"{name} was given for an artifact.",
                "An artifact is compiled already, with settings of its own.",
                f"Leave {name} out, or name the model it was compiled from.",
            )
    return inspection.describe_fit(path, asked.memory, asked.context)


def _about_model(model: str, asked: Asked) -> Description:
    from . import explaining, inspection

    question = asked.question()
    if question == "--fit":
        settings = explaining.FitSettings(asked.quant, asked.kv_dtype, asked.target, asked.dtype)
        return explaining.describe_model_fit(model, asked.memory, asked.context, settings)
    if not question:
        return inspection.describe_model(model)
    raise UsageError(
        "usage.not_compiled",
        f"{question} was asked about {model}, which is no artifact.",
        "It has no manifest.json: of what is not compiled only facts and --fit can be told.",
        "Compile it first, or ask about the artifact.",
    )
