"""`llmc compile`: a Hugging Face model folder becomes an artifact."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .collector import collector_paused
from .onnx_words import onnx_limits
from .output import Output, human_bytes, table, with_output
from .progress import shown_progress

if TYPE_CHECKING:
    from ..compiler.result import CompileResult


@click.command("compile")
@click.argument("model")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), help="Where the artifact goes.")
@click.option("--quant", metavar="PRESET", help="Quantise: see `llmc recipe list`.")
@click.option(
    "--target", help="See `llmc targets`; default: cpu where there is a C++ compiler, else reference."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="A YAML recipe in place of a preset.")
@click.option("--set", "overrides", multiple=True, metavar="PASS.OPTION=VALUE", help="Change an option.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text, JSON lines or chats to calibrate on; default: text that the model writes itself.",
)
@click.option("--max-kl", type=float, metavar="X", help="Largest mean KL divergence allowed, in nats.")
@click.option("--dtype", metavar="D", help="Compute in float32, bfloat16 or float16.")
@click.option("--kv-dtype", metavar="D", help="Keep the KV cache in this dtype.")
@click.option("--max-model-len", type=int, metavar="N", help="Longest sequence to compile for, in tokens.")
@click.option(
    "--verify", default="numerics", show_default=True, metavar="off|structure|numerics", help="Check passes."
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option("--dry-run", is_flag=True, help="Say what would be made and whether it fits; load no weights.")
@click.option("--cache/--no-cache", default=True, help="Reuse results of earlier compiles, or none.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Write the program after each pass there.")
@with_output
def compile_command(output: Output, model: str, path: Path | None, **options: Any) -> None:
    """Compile MODEL, a Hugging Face folder or a hub id in the local cache.

    Without --quant and --dtype the checkpoint's own precision is kept.
    """
    with collector_paused() if options["dry_run"] else nullcontext():
        from ..compiler.driver import compile_model

        with shown_progress(output) as progress:
            result = compile_model(model, output=path, progress=progress, **options)
    output.result(result.as_dict(), _summary(result))


def _summary(result: CompileResult) -> str:
    from ..artifact.reader import open_unchecked

    bound = "at most " if result.dry_run else ""
    size = f"{bound}{human_bytes(result.size_bytes)}, {result.bits_per_weight:.2f} bits a weight"
    lines = [("size", size), ("recipe", result.recipe), ("target", result.target)]
    if result.quality is not None:
        lines.append(("quality", result.quality.sentence()))
    lines.append(("memory", result.fit.sentence()))
    if result.reuse is not None:
        lines.append(("cache", result.reuse.sentence()))
    lines += [(f"way {number}", way) for number, way in enumerate(result.ways, start=1)]
    if result.target == "onnx" and not result.dry_run:
        lines += onnx_limits(open_unchecked(result.path))
    lines.append(("time", f"{result.seconds:.1f} s"))
    title = f"{'Would write' if result.dry_run else 'Wrote'} {result.path}"
    return f"{title}\n{table([('  ' + name, value) for name, value in lines])}"
