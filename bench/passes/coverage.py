"""What the canonicalise stage makes of every family: what it finds, and which operators stay generic."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench"))
from common import Record  # noqa: E402 - the folder above must be on the path first

from llmc.compiler.trace import trace_config  # noqa: E402
from llmc.models.families import FAMILIES, Family  # noqa: E402
from llmc.passes.base import PassContext  # noqa: E402
from llmc.passes.canonical import canonical_passes  # noqa: E402
from llmc.passes.manager import run_passes  # noqa: E402
from llmc.passes.rewrite import operator_of  # noqa: E402

VIEWS = {"reshape", "permute", "slice", "select", "expand", "cat", "getitem"}
SCALING = {"add", "mul", "div", "sub"}
PLAIN_ACTIVATIONS = {"gelu", "silu", "relu", "square", "sigmoid"}


def coverage_of(family: Family) -> dict[str, object]:
    """Counts for one family in float32: what was named, and what is generic beside views and sums."""
    config = getattr(transformers, family.config)(**family.options)
    traced = trace_config(config, dtype=torch.float32)
    program = run_passes(traced, canonical_passes(), PassContext())
    found = Counter(operator_of(node) for node in program.graph.nodes if node.op == "call_function")
    generic = {name: count for name, count in found.items() if not name.startswith("llmc.")}
    rest = set(generic) - VIEWS - SCALING
    return {
        "nodes_traced": traced.num_nodes,
        "nodes_canonical": program.num_nodes,
        "attention": found["llmc.attention"],
        "ropes": found["llmc.rope"],
        "gated_activations": found["llmc.gated_activation"] + found["llmc.gated_activation_packed"],
        "generic": dict(sorted(generic.items())),
        "canonical": not rest,
        "canonical_but_for_plain_activations": rest <= PLAIN_ACTIVATIONS,
        "misses": [f"{record.name}: {miss}" for record in program.history for miss in record.misses],
    }


def main() -> None:
    """Measure every family that compiles, print one line each, write `results/coverage.json`."""
    record = Record("coverage")
    results: dict[str, object] = {}
    for family in FAMILIES:
        if family.refused is None:
            results[family.name] = found = coverage_of(family)
            rest = sorted(set(found["generic"]) - VIEWS - SCALING)  # type: ignore[call-overload]
            print(f"{family.name:18}{found['ropes']:>4} ropes {found['gated_activations']:>4} gated  {rest}")
    path = record.write(results)
    print(json.dumps({"written": path.name, "families": len(results)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
