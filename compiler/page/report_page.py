"""The report of one artifact as a page, made of what report.json says."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .frame import document, facts_table, section, wide_table
from .plots import bars

_MIB = 2**20


def report_page(data: Mapping[str, Any], title: str) -> bytes:
    """The bytes of report.html: the same for the same report."""
    size, memory, quality = data["size"], data["memory"], data["quality"]
    facts = [
        ("recipe", str(data["recipe"])),
        ("parameters", f"{size['num_parameters']:,}"),
        ("weights", f"{size['weight_bytes'] / _MIB:.1f} MiB, {size['bits_per_weight']:.2f} bits a weight"),
        ("checked at compile", str(data["verify"])),
    ]
    largest = [(entry["name"], entry["bytes"] / _MIB) for entry in size["largest_weights"]]
    parts = [
        section("What it is", facts_table(facts)),
        section("How far from the original", facts_table([(n, _text(v)) for n, v in quality.items()])),
        *_backend(data["backend"]),
        section("Where the bytes are", bars("largest weights, MiB", largest)),
        section("What it needs", facts_table([(n, _text(v)) for n, v in memory.items()])),
        section("What the passes did", _passes(data["passes"])),
        section("What was decided", _decisions(data["passes"])),
    ]
    return document(title, "".join(parts)).encode()


def _backend(backend: Mapping[str, Any]) -> list[str]:
    """What the target's own executor computed, where it was compared with the reference backend."""
    if not backend:
        return []
    pair = backend["from_reference"], backend["from_original"]
    rows = [[name, *(_text(side[name]) for side in pair)] for name in pair[0]]
    columns = ["logits of the same prompts", "from the compiled program by reference", "from the original"]
    oracle = f"largest difference of a logprob {_text(backend['max_logprob_error'])} nats"
    facts = [("run by", str(backend["executor"])), ("oracle", f"{oracle} over {backend['tokens']} tokens")]
    return [section("What its executor computes", facts_table(facts) + wide_table(columns, rows))]


def _passes(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            record["name"],
            str(record["matches"]),
            f"{record['nodes_before']} → {record['nodes_after']}",
            "–" if record["divergence"] is None else f"{record['divergence']:.3g}",
        ]
        for record in records
    ]
    return wide_table(["pass", "matches", "nodes", "largest change of a logit"], rows)


def _decisions(records: list[dict[str, Any]]) -> str:
    parts: list[str] = []
    for record in records:
        rows = [[d["subject"], d["choice"], d["reason"]] for d in record["decisions"]]
        if rows:
            table = wide_table(["what", "choice", "because"], rows)
            name = f"{record['name']}: {len(rows)} decisions"
            parts.append(f"<details><summary>{escape(name)}</summary>{table}</details>")
        parts += [f"<p>{escape(record['name'])} left alone: {escape(miss)}</p>" for miss in record["misses"]]
    return "".join(parts) or "<p>Nothing.</p>"


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        low, high = value
        return f"{_text(low)} to {_text(high)}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
