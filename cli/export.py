"""`llmc export`: what was quantised here, as a checkpoint that vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import Output, human_bytes, table, with_output
from .progress import shown_progress

if TYPE_CHECKING:
    from ..compiler.export.exporting import Exported

_SHOWN = 3


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--model", required=True, metavar="MODEL", help="The folder or hub id that was compiled.")
@click.option(
    "--format", "_format", type=click.Choice(["compressed-tensors"]), default="compressed-tensors",
    show_default=True, help="What to write.",
)  # fmt: skip
@with_output
def export(output: Output, artifact: Path, out: Path, model: str, _format: str) -> None:
    """Write the weights of ARTIFACT as a compressed-tensors checkpoint.

    Linears and experts keep their codes and scales. MODEL gives config.json and the names of tensors, and
    must be the one that was compiled, by its hashes.
    """
    from ..compiler.export.exporting import export_artifact

    with shown_progress(output) as progress:
        progress.begin("export")
        exported = export_artifact(artifact, out, model, progress.advance)
    output.result(exported.as_dict(), _summary(exported))


def _summary(exported: Exported) -> str:
    rows = [("  size", human_bytes(exported.size_bytes))]
    rows += [("  codes", f"{count} modules of {name}") for name, count in exported.forms.items()]
    if exported.widened:
        rows.append(("  widened", "codes of 3 bits are stored in 4, which more programs read"))
    if exported.dequantised:
        names = exported.dequantised
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        why = f"readers of the format take these as values, so they are {exported.dtype}"
        rows.append(("  dequantised", f"{shown}: {why}"))
    return f"Wrote {exported.path}\n{table(rows)}"
