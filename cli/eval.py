"""`llmc eval`: how well an artifact predicts text, and how far it is from the model it came from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import Output, table, with_output
from .progress import shown_progress

if TYPE_CHECKING:
    from ..compiler.evaluate import Evaluated


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--data", "--text", type=click.Path(path_type=Path), required=True, help="Text or JSON lines to predict."
)
@click.option("--reference", metavar="MODEL", help="The unquantised model to compare with.")
@click.option("--window", type=int, metavar="N", help="Tokens seen at a time; default: the model's context.")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows; default: no overlap.")
@with_output
def evaluate(
    output: Output, artifact: Path, data: Path, reference: str | None, window: int | None, stride: int | None
) -> None:
    """Perplexity of ARTIFACT on text; with --reference also KL divergence and agreement, with intervals.

    Documents end at the EOS text. Each is cut into windows, and computed by the artifact's own program with
    the reference operators in float32.
    """
    from ..compiler.evaluate import EvalRequest, evaluate

    request = EvalRequest(artifact=artifact, data=data, reference=reference, window=window, stride=stride)
    with shown_progress(output) as progress:
        progress.begin("evaluate")
        found = evaluate(request, progress.advance)
    how = {
        "window": found.window,
        "stride": found.stride,
        "documents": found.documents,
        "bits_per_weight": found.bits_per_weight,
        "worst_layers": [asdict(error) for error in found.worst_layers],
    }
    output.result({**found.judgement.as_dict(), **how}, _summary(found))


def _summary(found: Evaluated) -> str:
    judged = found.judgement
    text = f"{judged.tokens} in {judged.windows} windows of up to {found.window}, {found.documents} documents"
    rows = [("tokens", text)]
    for name in ("perplexity", "reference_perplexity", "perplexity_ratio", "kl_mean", "same_top"):
        entry = getattr(judged, name)
        if entry is not None:
            rows.append((name.replace("_", " "), f"{entry.value:.5g}  [{entry.low:.5g}, {entry.high:.5g}]"))
    if judged.kl_p99 is not None:
        rows.append(("kl p99", f"{judged.kl_p99:.4g}"))
        rows.append(("greedy match", f"{judged.greedy_match:.1f} tokens"))
    rows.append(("bits per weight", f"{found.bits_per_weight:.3f}"))
    for number, layer in enumerate(found.worst_layers):
        lost = f"{layer.error:.2g} of its output, {layer.nearest_error:.2g} by rounding to nearest"
        text = f"{layer.subject} lost {lost}"
        rows.append(("" if number else "worst layers", text))
    return table(rows)
