"""What `llmc inspect` says beyond facts: why, how far off, what fits, what differs; as data and as text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..spec.errors import UsageError
from .inspection import Description, parse_bytes
from .output import human_bytes, table

_DEFAULT_PROMPT = "Once upon a time there was a little girl who lived near the forest with her mother."


def describe_reasons(path: Path) -> Description:
    """What was fused and what not and why, and every kind of decision, for the artifact at `path`."""
    from ..artifact.explain import choices, fusions
    from ..artifact.reader import open_unchecked

    manifest = open_unchecked(path).manifest
    fused, chosen = fusions(manifest), choices(manifest)
    lines = ["fused"]
    for fusion in fused:
        lines.append(f"  {fusion.name}: {fusion.matches} places")
        lines += [f"    left alone: {miss}" for miss in fusion.misses]
    lines.append("\nchosen")
    for choice in chosen:
        counted = ", ".join(f"{count} x {what}" for what, count in choice.counts.items())
        lines.append(f"  {choice.name}: {counted}\n    for example because {choice.reason}")
    data = {"fusions": [asdict(entry) for entry in fused], "choices": [asdict(entry) for entry in chosen]}
    return Description(data, "\n".join(lines))


def describe_changes(path: Path, other: Path) -> Description:
    """Every input in which the artifact at `path` differs from that at `other`."""
    from ..artifact.explain import changes
    from ..artifact.reader import open_unchecked

    found = changes(open_unchecked(path).manifest, open_unchecked(other).manifest)
    rows = [(change.what, change.here, change.there) for change in found]
    text = table(rows, ("input", path.name, other.name)) if rows else "Both were made of the same inputs."
    return Description({"changes": [asdict(change) for change in found]}, text)


def describe_model_fit(
    model: str, memory: str | None, context: int | None, quant: str | None, dtype: str | None
) -> Description:
    """Whether a model fits, from its config alone, and three ways to make it fit where it does not."""
    from ..compiler.estimate import answer_fit
    from ..compiler.source import find_model
    from ..runtime.memory import available_memory_bytes

    total = available_memory_bytes() if memory is None else parse_bytes(memory)
    found = answer_fit(find_model(model), memory_bytes=total, context=context, quant=quant, dtype=dtype)
    estimate = found.estimate
    each = estimate.request_bytes(found.context)
    rows = [
        ("model", f"{estimate.num_parameters:,} parameters, {estimate.num_layers} layers"),
        ("recipe", f"{estimate.recipe}: {estimate.bits_per_weight:.2f} bits a weight"),
        ("memory", human_bytes(found.memory_bytes)),
        ("weights", human_bytes(estimate.weight_bytes)),
        ("activations", human_bytes(estimate.activation_bytes)),
        ("cache", f"{human_bytes(each)} a request of {found.context} tokens"),
        ("fits", f"{found.requests} requests of {found.context} tokens" if found.requests else "no"),
        *((f"way {number}", way) for number, way in enumerate(found.ways, start=1)),
    ]
    return Description(found.as_dict(), table(rows))


def describe_trace(path: Path, prompts: tuple[str, ...], reference: str | None, bound: float) -> Description:
    """What each layer of the artifact at `path` computes on `prompts`, its error to `reference` (a model
    folder; the portable program without one), and whether the target's code says what the program says."""
    from ..artifact.reader import open_artifact
    from ..compiler.compare.quality import portable_program
    from ..compiler.evaluate import reference_program
    from ..compiler.layer_trace import trace_layers
    from ..runtime.tokenizer import Tokenizer

    artifact = open_artifact(path)
    tokenizer = Tokenizer.from_folder(artifact.tokenizer_folder)
    limit = artifact.manifest.spec.max_context - 1
    ids = [tokenizer.encode(prompt)[:limit] for prompt in prompts or (_DEFAULT_PROMPT,)]
    if any(len(found) < 2 for found in ids):
        raise UsageError(
            "usage.prompt",
            "A prompt has fewer than two tokens.",
            "There is nothing to trace in it.",
            "Write a longer --prompt.",
        )
    program = portable_program(artifact) if reference is None else reference_program(reference)
    name = "the portable program" if reference is None else reference
    found = trace_layers(artifact, ids, reference=program, reference_name=name, bound=bound)
    rows = [
        (
            line.layer,
            line.node,
            f"{line.mean:.3g}",
            f"{line.deviation:.3g}",
            f"{line.largest:.3g}",
            f"{line.error:.3g}" + (" !" if line.exceeds else ""),
        )
        for line in found.lines
    ]
    header = ("layer", "node", "mean", "deviation", "largest", "error")
    return Description(found.as_dict(), f"{table(rows, header)}\n\n{found.verdict()}")


def draw_program(path: Path, picture: Path) -> Description:
    """Write the final program of the artifact at `path` as an SVG picture, layers folded."""
    from ..artifact.reader import open_unchecked
    from ..artifact.schema import PROGRAM
    from ..compiler.page.picture import program_picture
    from ..ir.document import decode_program

    artifact = open_unchecked(path)
    graph = decode_program(artifact.read_bytes(PROGRAM)).graph
    picture.write_text(program_picture(graph, artifact.manifest.provenance.model), encoding="utf-8")
    return Description({"picture": str(picture)}, f"Wrote {picture}.")
