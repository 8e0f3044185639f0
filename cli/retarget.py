"""`llmc retarget`: new kernels for an artifact, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import Output, table, with_output

if TYPE_CHECKING:
    from ..codegen.cuda.tuning import Measured


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--target", default=None, metavar="T", help="Such as cuda:sm_90; the artifact's own by default."
)
@click.option("--tune", is_flag=True, help="Measure on this GPU which variant of each product is fastest.")
@click.option("--force", is_flag=True, help="Replace an artifact that is there.")
@with_output
def retarget(output: Output, artifact: Path, out: Path, target: str | None, tune: bool, force: bool) -> None:
    """Write ARTIFACT again with kernels for other NVIDIA GPUs, or tuned on this one.

    Programs, weights and tokens stay what they are: all variants give the same bits.
    """
    from ..compiler.retarget import retarget_artifact

    made = retarget_artifact(artifact, out, target=target, tune=tune, force=force)
    name = made.artifact.manifest.target.name
    found = {
        "artifact": str(made.artifact.path),
        "target": name,
        "kernels": made.num_kernels,
        "tuned": [_line(each) for each in made.measured],
    }
    rows = [(f"  {line['product']}", str(line["choice"])) for line in map(_line, made.measured)]
    text = f"Wrote {made.artifact.path} with {made.num_kernels} kernels for {name}."
    output.result(found, f"{text}\n{table(rows)}" if rows else text)


def _line(each: Measured) -> dict[str, object]:
    chosen = each.chosen
    first = next(iter(each.seconds.values()))
    return {
        "product": each.name,
        "choice": f"{chosen.columns} columns, {chosen.warps} warps, {chosen.stages} stages",
        "seconds": each.seconds[chosen],
        "shipped_seconds": first,
        "variants": len(each.seconds),
        "differing": each.num_differing,
    }
