"""`llmc inspect`: what is inside an artifact, or a model, and why."""

from __future__ import annotations

from pathlib import Path

import click

from .output import Output, with_output


@click.command()
@click.argument("path", metavar="ARTIFACT|MODEL")
@click.option("--graph", is_flag=True, help="Print the final program as text.")
@click.option("--pass", "pass_name", metavar="NAME", help="Say what one pass did, and what it left alone.")
@click.option("--fit", is_flag=True, help="Say what fits into --memory at --context tokens a request.")
@click.option(
    "--memory", metavar="BYTES", help="With --fit: bytes, or a number with K, M, G (default: free)."
)
@click.option("--context", type=int, metavar="N", help="With --fit: tokens a request (default: the model's).")
@with_output
def inspect(
    output: Output,
    path: str,
    graph: bool,
    pass_name: str | None,
    fit: bool,
    memory: str | None,
    context: int | None,
) -> None:
    """Say what ARTIFACT or MODEL is made of."""
    from . import inspection

    if not inspection.is_artifact(Path(path)):
        data, text = inspection.describe_model(path)
    elif graph:
        data, text = inspection.program_text(Path(path))
    elif pass_name is not None:
        data, text = inspection.describe_pass(Path(path), pass_name)
    elif fit:
        data, text = inspection.describe_fit(Path(path), memory, context)
    else:
        data, text = inspection.describe_artifact(Path(path))
    output.result(data, text)
