"""What `llmc inspect` says about artifacts and models, as data and as text."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..spec.errors import UsageError
from .onnx_words import onnx_facts, onnx_rows
from .output import human_bytes, table

if TYPE_CHECKING:
    from ..artifact.schema import Manifest
    from ..spec.history import PassRecord
    from ..spec.model import ModelSpec

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Description(NamedTuple):
    """One answer in both forms."""

    data: dict[str, Any]
    text: str


def describe_artifact(path: Path) -> Description:
    """Model, recipe, target, sizes and passes of the artifact at `path`."""
    from ..artifact.reader import open_unchecked
    from ..artifact.summary import summarise

    artifact = open_unchecked(path)
    summary = summarise(artifact)
    manifest = summary.manifest
    onnx = onnx_facts(artifact) if manifest.target.kind == "onnx" else {}
    stored = ", ".join(f"{human_bytes(group.size_bytes)} {group.dtype}" for group in summary.weights)
    others = ", ".join(
        f"{human_bytes(size)} {kind}" for kind, size in summary.size_by_kind.items() if kind != "weights"
    )
    rows = [
        *_spec_rows(manifest.spec),
        ("source", f"{manifest.provenance.model}, compiled by llmc {manifest.provenance.llmc_version}"),
        ("recipe", manifest.recipe.name),
        ("target", manifest.target.name),
        ("weights", f"{stored}: {summary.bits_per_weight:.2f} bits a weight"),
        ("size", f"{human_bytes(summary.size_bytes)}, beside the weights {others}"),
        *_cache_rows(manifest),
        *onnx_rows(onnx),
    ]
    passes = [
        (record.name, str(record.matches), f"{record.nodes_before} -> {record.nodes_after}", _shown(record))
        for record in manifest.history
    ]
    text = f"{table(rows)}\n\n{table(passes, ('pass', 'matches', 'nodes', 'max logit change'))}"
    return Description(summary.as_dict() | ({"onnx": onnx} if onnx else {}), text)


def describe_pass(path: Path, name: str) -> Description:
    """What the pass `name` did to the artifact at `path`, and its reasons. UsageError for a pass that did
    not run."""
    from ..artifact.reader import open_unchecked

    history = open_unchecked(path).manifest.history
    records = [record for record in history if record.name == name]
    if not records:
        raise UsageError(
            "usage.pass",
            f"No pass {name!r} ran on this artifact.",
            f"These did: {', '.join(dict.fromkeys(record.name for record in history))}.",
            "Choose one of these.",
        )
    return Description(
        {"passes": [asdict(record) for record in records]}, "\n\n".join(map(_explained, records))
    )


def program_text(path: Path) -> Description:
    """The final program of the artifact at `path` as text."""
    from ..artifact.reader import open_unchecked
    from ..artifact.schema import PROGRAM_TEXT

    text = open_unchecked(path).read_bytes(PROGRAM_TEXT).decode()
    return Description({"program": text}, text.rstrip("\n"))


def describe_fit(path: Path, memory: str | None, context: int | None) -> Description:
    """How many requests of `context` tokens the artifact at `path` serves in `memory`."""
    from ..artifact.reader import open_unchecked
    from ..runtime.fit import fit_within, ways_to_fit
    from ..runtime.memory import available_memory_bytes

    manifest = open_unchecked(path).manifest
    plan, most = manifest.memory, manifest.spec.max_context
    if plan is None:
        raise UsageError(
            "usage.no_plan",
            f"{path.name} has no memory plan.",
            "Its recipe ran without the pass `memory_plan`.",
            "Compile it with that pass at the end of the recipe.",
        )
    tokens = most if context is None else context
    if not 1 <= tokens <= most:
        raise UsageError(
            "usage.context",
            f"A context of {tokens} tokens was asked for.",
            f"The artifact's own is {most} tokens.",
            "Choose one within it.",
        )
    total = available_memory_bytes() if memory is None else parse_bytes(memory)
    found = fit_within(plan, manifest.cache, tokens, total)
    ways = () if found.requests else ways_to_fit(plan, manifest.cache, tokens, total)
    data = {
        "memory_bytes": total,
        "needed_bytes": found.needed_bytes,
        "cache_bytes_per_token": found.cache_bytes_per_token,
        "cache_tokens": found.cache_tokens,
        "context": tokens,
        "request_bytes": found.request_bytes,
        "requests": found.requests,
        "ways": ways,
    }
    rows = [
        ("memory", human_bytes(total)),
        ("weights and activations", human_bytes(found.weight_bytes + found.activation_bytes)),
        ("cache", f"{human_bytes(found.request_bytes)} a request of {tokens} tokens, in whole pages"),
        ("fits", f"{found.requests} requests of {tokens} tokens" if found.requests else "no"),
        *((f"way {number}", way) for number, way in enumerate(ways, start=1)),
    ]
    return Description(data, table(rows))


def describe_model(model: str) -> Description:
    """The facts of a Hugging Face model, from its config and headers alone."""
    from ..compiler.checkpoint import open_checkpoint
    from ..compiler.source import find_model

    checkpoint = open_checkpoint(find_model(model))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    kind, compute = str(checkpoint.config.model_type), str(checkpoint.dtype).removeprefix("torch.")
    classes: list[str] = checkpoint.raw_config.get("architectures") or []
    template = checkpoint.tokenizer.chat_template is not None
    data = {
        "folder": str(checkpoint.folder),
        "model_type": kind,
        "architectures": classes,
        "tensors": len(checkpoint.tensors),
        "size_bytes": checkpoint.num_bytes,
        "stored_dtypes": dtypes,
        "compute_dtype": compute,
        "chat_template": template,
    }
    rows = [
        ("model", f"{kind} ({', '.join(classes)})"),
        ("tensors", f"{len(checkpoint.tensors)}, {human_bytes(checkpoint.num_bytes)}, {', '.join(dtypes)}"),
        ("computes in", compute),
        ("chat template", "yes" if template else "no"),
    ]
    return Description(data, table(rows))


def parse_bytes(text: str) -> int:
    """A size such as 8G, 500M or 1073741824, in bytes. UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(
            "usage.bytes",
            f"{text!r} is no size.",
            "A size is a number of bytes, or a number with K, M, G or T for powers of 1024.",
            "Write for example 8G.",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _spec_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    heads = spec.attention[0] if spec.attention else None
    shape = f"{spec.num_layers} layers, width {spec.hidden_size}, vocabulary {spec.vocab_size}"
    if heads is not None:
        shape += f", {heads.num_heads} heads over {heads.num_kv_heads} KV heads of {heads.qk_dim}"
    return [
        ("model", f"{spec.family} ({spec.architecture}), {spec.num_parameters:,} parameters"),
        ("shape", shape),
        ("context", f"{spec.max_context} tokens"),
        ("computes in", spec.compute_dtype),
        *((f"choice: {name}", value) for name, value in spec.choices.items()),
    ]


def _cache_rows(manifest: Manifest) -> list[tuple[str, str]]:
    cache = manifest.cache
    rows = [("cache", f"{human_bytes(cache.bytes_per_token)} a token")]
    for index, group in enumerate(cache.groups):
        kind = group.kind if not group.window else f"{group.kind} of {group.window}"
        layers = f"{len(group.layers)} layers, {kind}, {group.dtype}, pages of {group.page_tokens} tokens"
        rows.append((f"  group {index}", layers))
    return rows


def _shown(record: PassRecord) -> str:
    return "" if record.divergence is None else f"{record.divergence:.3g}"


def _explained(record: PassRecord) -> str:
    lines = [
        f"{record.name}: {record.matches} matches, {record.nodes_before} -> {record.nodes_after} nodes",
        *(f"  option    {name} = {value}" for name, value in record.options.items()),
        *(f"  decision  {d.subject}: {d.choice}, because {d.reason}" for d in record.decisions),
        *(f"  miss      {reason}" for reason in record.misses),
    ]
    return "\n".join(lines)
