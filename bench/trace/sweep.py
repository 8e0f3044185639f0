"""Compile every family of the table small and compare with transformers; write models/families.json.

    python bench/trace/sweep.py [NAME ...]

`llmc models` prints that file. With names, only these are run and nothing is written.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from llmc.compiler.hf.adapter import config_of
from llmc.compiler.selfcheck import self_check
from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES, Family
from llmc.spec.errors import LlmcError

TABLE = Path(__file__).resolve().parents[2] / "models" / "families.json"


def run(family: Family) -> dict[str, object]:
    """One row: what came of the family, and whether that is what the table says."""
    row: dict[str, object] = {
        "name": family.name,
        "config": family.config,
        "status": "supported",
        "nodes": None,
        "layers": None,
        "error": None,
        "code": None,
        "note": family.note,
    }
    config = config_of(family.config, dict(family.options))
    try:
        row["nodes"] = trace_config(config, dtype=torch.bfloat16).num_nodes
        report = self_check(config)
    except LlmcError as error:
        row["status"] = "refused" if error.code == family.refused else "broken"
        row["code"], row["why"] = error.code, error.why
        return row
    row["layers"], row["error"] = report.num_layers, float(f"{report.max_rel_error:.2g}")
    if family.refused is not None:
        row["status"] = "broken"
    return row


def main(names: list[str]) -> int:
    """Run the families and print a line each; the exit code is the number that broke."""
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        started = time.monotonic()
        rows.append(run(family))
        seconds = time.monotonic() - started
        shown = {key: value for key, value in rows[-1].items() if value is not None and key != "why"}
        print(f"{seconds:5.1f}s", *(f"{key}={value}" for key, value in shown.items()), flush=True)
    if not names:
        TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    broken = [row["name"] for row in rows if row["status"] == "broken"]
    supported = sum(row["status"] == "supported" for row in rows)
    print(f"{supported} supported, {len(rows) - supported - len(broken)} refused, broken: {broken or 'none'}")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
