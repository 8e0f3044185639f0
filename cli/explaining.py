"""What `llmc inspect` says beyond facts: why, how far off, what fits, what differs; as data and as text."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..spec.errors import UsageError
from .collector import collector_paused
from .inspection import Description, parse_bytes
from .output import human_bytes, table

if TYPE_CHECKING:
    from ..artifact.schema import Manifest
    from ..spec.model import ModelSpec

_DEFAULT_PROMPT = "Once upon a time there was a little girl who lived near the forest with her mother."


class FitSettings(NamedTuple):
    """How a model would be compiled."""

    quant: str | None
    kv_dtype: str | None
    target: str | None
    dtype: str | None


def describe_reasons(path: Path) -> Description:
    """What was fused and what not and why, and every kind of decision, for the artifact at `path`."""
    from ..artifact.explain import choices, fusions, inputs_key
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
    key = inputs_key(manifest)
    lines.append(f"\nkey of all inputs: {key} (--against ARTIFACT says which differ)")
    data = {
        "fusions": [asdict(entry) for entry in fused],
        "choices": [asdict(entry) for entry in chosen],
        "inputs_key": key,
    }
    return Description(data, "\n".join(lines))


def describe_changes(path: Path, other: Path) -> Description:
    """Every input in which the artifact at `path` differs from that at `other`."""
    from ..artifact.explain import changes, inputs_key
    from ..artifact.reader import open_unchecked

    ours, theirs = open_unchecked(path).manifest, open_unchecked(other).manifest
    found = changes(ours, theirs)
    keys = {path.name: inputs_key(ours), other.name: inputs_key(theirs)}
    rows = [(change.what, change.here, change.there) for change in found]
    text = table(rows, ("input", path.name, other.name)) if rows else "Both were made of the same inputs."
    return Description({"changes": [asdict(change) for change in found], "inputs_keys": keys}, text)


def describe_kernels(path: Path) -> Description:
    """Which kernel each node of the artifact at `path` runs, and what lost where there was a choice; for
    GPUs, the variant of every class of products, and how it was chosen."""
    from ..artifact.cuda import CUDA_UNIT, decode_unit
    from ..artifact.placement import node_kernels
    from ..artifact.reader import open_unchecked

    artifact = open_unchecked(path)
    found, kind = node_kernels(artifact), artifact.manifest.target.kind
    variants = decode_unit(artifact.read_bytes(CUDA_UNIT)).variants if kind == "cuda" else ()
    if not found and not variants:
        text = f"No pass had a choice of kernels for {kind}, whose nodes run the operators of the program."
        return Description({"kernels": []}, text)
    rows = [
        (line.node, line.kernel, f"{line.choice}: {line.reason}" if line.choice else "") for line in found
    ]
    parts = [table(rows, ("node", "kernel", "choice, and what it was compared with"))] if rows else []
    data: dict[str, Any] = {"kernels": [asdict(line) for line in found]}
    if variants:
        taken = [
            (
                each.product,
                f"{each.columns} columns, {each.warps} warps, {each.stages} loads ahead",
                each.reason,
            )
            for each in variants
        ]
        parts.append(table(taken, ("product, rows a program", "variant", "how it was chosen")))
        data["variants"] = [asdict(each) for each in variants]
    return Description(data, "\n\n".join(parts))


def describe_bytes(path: Path) -> Description:
    """Where the bytes of the artifact at `path` are, on the disk and in memory."""
    from ..artifact.placement import weight_shares
    from ..artifact.reader import open_unchecked
    from ..artifact.summary import summarise

    artifact = open_unchecked(path)
    summary, shares = summarise(artifact), weight_shares(artifact)
    total = sum(share.size_bytes for share in shares)
    rows = [
        *((kind, human_bytes(size), "") for kind, size in summary.size_by_kind.items()),
        *(
            (
                f"  {share.part}",
                human_bytes(share.size_bytes),
                f"{100 * share.size_bytes / max(1, total):.1f} % of weights, {share.num_tensors} tensors",
            )
            for share in shares
        ),
        *_plan_rows(artifact.manifest),
    ]
    data = {
        "size_by_kind": dict(summary.size_by_kind),
        "weights": [asdict(share) for share in shares],
        "memory": None if artifact.manifest.memory is None else asdict(artifact.manifest.memory),
    }
    return Description(data, table(rows))


def _plan_rows(manifest: Manifest) -> list[tuple[str, str, str]]:
    plan = manifest.memory
    if plan is None:
        return []
    saved = f"{human_bytes(plan.activation_bytes_unshared)} without reuse"
    step = f"of a step of {plan.max_tokens} tokens, {plan.max_rows} rows of logits; {saved}"
    cache = [
        (
            f"  {group.kind} attention",
            f"{human_bytes(group.bytes_per_token)} a token",
            f"{len(group.layers)} layers, pages of {group.page_tokens} tokens",
        )
        for group in manifest.cache.groups
    ]
    return [
        ("in memory: weights", human_bytes(plan.weight_bytes), ""),
        ("in memory: activations", human_bytes(plan.activation_bytes), step),
        ("in memory: cache", f"{human_bytes(plan.cache_bytes_per_token)} a token", ""),
        *cache,
    ]


def describe_model_fit(
    model: str, memory: str | None, context: int | None, settings: FitSettings
) -> Description:
    """Whether a model fits, from its config alone, and three ways to make it fit where it does not."""
    with collector_paused():
        from ..compiler.fitting import answer_fit
        from ..compiler.source import find_model
        from ..runtime.memory import available_memory_bytes

        total = available_memory_bytes() if memory is None else parse_bytes(memory)
        found = answer_fit(find_model(model), memory_bytes=total, context=context, **settings._asdict())
    estimate, fit = found.estimate, found.fit
    rows = [
        ("model", f"{estimate.num_parameters:,} parameters, {estimate.num_layers} layers"),
        ("recipe", f"{estimate.recipe} for {found.target}: {estimate.bits_per_weight:.2f} bits a weight"),
        ("memory", human_bytes(fit.memory_bytes)),
        ("weights", f"{human_bytes(fit.weight_bytes)}, {human_bytes(found.files.weights)} as files"),
        ("activations", human_bytes(fit.activation_bytes)),
        ("cache", f"{human_bytes(fit.request_bytes)} a request of {fit.tokens_per_request} tokens"),
        ("fits", f"{fit.requests} requests of {fit.tokens_per_request} tokens" if fit.requests else "no"),
        *((f"way {number}", way.text) for number, way in enumerate(found.ways, start=1)),
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

    if not (math.isfinite(bound) and bound > 0):
        raise UsageError(
            "usage.bound",
            f"--bound is {bound}.",
            "It is the relative error that a layer may have, a number above 0.",
            "Choose another, such as 0.25.",
        )
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
    if reference is not None:
        _check_same_model(artifact.manifest.spec, program.spec, reference)
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
            "" if line.code_error is None else f"{line.code_error:.3g}",
        )
        for line in found.lines
    ]
    header = ("layer", "node", "mean", "deviation", "largest", "error", "code")
    return Description(found.as_dict(), f"{table(rows, header)}\n\n{found.verdict()}")


def _check_same_model(own: ModelSpec, other: ModelSpec, reference: str) -> None:
    """UsageError naming what differs where an artifact is not of the model it is to be held to."""
    from ..compiler.compare.sides import model_facts

    for what, one, two in model_facts(own, other):
        if one != two:
            raise UsageError(
                "usage.reference",
                f"The artifact was not compiled from {reference}.",
                f"They differ in {what}: {one} and {two}.",
                "Name the model that it was compiled from with --reference, or leave it out.",
            )


def draw_program(path: Path, picture: Path) -> Description:
    """Write the final program of the artifact at `path` as an SVG picture, layers folded."""
    from ..artifact.reader import open_unchecked
    from ..artifact.schema import PROGRAM
    from ..compiler.page.picture import program_picture
    from ..ir.document import decode_program

    artifact = open_unchecked(path)
    graph = decode_program(artifact.read_bytes(PROGRAM)).graph
    try:
        picture.write_text(program_picture(graph, artifact.manifest.provenance.model), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "usage.picture",
            f"{picture} cannot be written.",
            f"The system says: {error.strerror or error}.",
            "Name another file with -o.",
        ) from error
    return Description({"picture": str(picture)}, f"Wrote {picture}.")
