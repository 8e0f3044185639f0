"""`llmc bisect`: which pass breaks a model, and where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import Output, with_output
from .progress import shown_progress

if TYPE_CHECKING:
    from ..compiler.bisect_model import BisectResult


@click.command()
@click.argument("model")
@click.option("--quant", metavar="PRESET", help="The preset to bisect: see `llmc recipe list`.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A YAML recipe in place of a preset.")
@click.option("--set", "overrides", multiple=True, metavar="PASS.OPTION=VALUE", help="Change an option.")
@click.option("--target", default="reference", show_default=True, help="Whose options passes look at.")
@click.option("--dtype", metavar="D", help="Compute in float32, bfloat16 or float16.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Probe with this text (default: random)."
)
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    help="Write a reproducer of what was found.",
)
@with_output
def bisect(output: Output, model: str, folder: Path | None, **options: Any) -> int:
    """Name the first pass of a recipe that changes what MODEL computes more than its contract allows.

    Exits with 1 when it names one. A reproducer is a folder with a small model, the recipe and the verdict.
    """
    from ..compiler.bisect_model import bisect_model

    with shown_progress(output) as progress:
        found = bisect_model(model, output=folder, progress=progress, **options)
    data = found.verdict.as_dict()
    if found.reproducer is not None:
        data["reproducer"] = {
            "path": str(found.reproducer.path),
            "reproduces": found.reproducer.reproduces,
        }
    output.result(data, _told(found))
    return 0 if found.verdict.is_clean else 1


def _told(found: BisectResult) -> str:
    verdict = found.verdict
    if verdict.is_clean:
        return f"Every one of {len(verdict.passes)} passes kept its contract ({verdict.runs} runs)."
    lines = [
        f"Pass {verdict.pass_name!r} ({verdict.index + 1} of {len(verdict.passes)}) breaks its contract.",
        verdict.why,
    ]
    if verdict.suspect is not None:
        lines.append(f"First difference: {verdict.suspect.sentence()}.")
    if found.reproducer is not None:
        shown = "shows it" if found.reproducer.reproduces else "does not show it with random weights"
        lines.append(f"Reproducer: {found.reproducer.path}, whose small model {shown}.")
    return "\n".join(lines)
