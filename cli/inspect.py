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
@click.option("--quant", metavar="PRESET", help="With --fit of a model: how it would be quantised.")
@click.option("--dtype", metavar="D", help="With --fit of a model: what it would compute in.")
@click.option("--why", is_flag=True, help="Say what was fused and what not, and which choices were taken.")
@click.option(
    "--against", type=click.Path(path_type=Path), help="Say which inputs differ from this artifact's."
)
@click.option("--trace", is_flag=True, help="Say what each layer computes and how far off it is.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="With --trace: a text to run.")
@click.option("--reference", metavar="MODEL", help="With --trace: the model that errors are measured to.")
@click.option("--bound", default=0.25, show_default=True, help="With --trace: the relative error allowed.")
@click.option(
    "--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the program, layers folded."
)
@with_output
def inspect(
    output: Output,
    path: str,
    graph: bool,
    pass_name: str | None,
    fit: bool,
    memory: str | None,
    context: int | None,
    quant: str | None,
    dtype: str | None,
    why: bool,
    against: Path | None,
    trace: bool,
    prompts: tuple[str, ...],
    reference: str | None,
    bound: float,
    svg: Path | None,
) -> None:
    """Say what ARTIFACT or MODEL is made of, and why."""
    from . import explaining, inspection

    artifact = Path(path)
    if not inspection.is_artifact(artifact):
        asked = (memory, context, quant, dtype)
        data, text = explaining.describe_model_fit(path, *asked) if fit else inspection.describe_model(path)
    elif graph:
        data, text = inspection.program_text(artifact)
    elif pass_name is not None:
        data, text = inspection.describe_pass(artifact, pass_name)
    elif fit:
        data, text = inspection.describe_fit(artifact, memory, context)
    elif why:
        data, text = explaining.describe_reasons(artifact)
    elif against is not None:
        data, text = explaining.describe_changes(artifact, against)
    elif trace:
        data, text = explaining.describe_trace(artifact, prompts, reference, bound)
    elif svg is not None:
        data, text = explaining.draw_program(artifact, svg)
    else:
        data, text = inspection.describe_artifact(artifact)
    output.result(data, text)
