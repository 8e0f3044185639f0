"""How long from the start of a process to the first token, and how much memory one request takes at most.

python bench/cpu/first_token.py [ARTIFACT ...] [--repeats N]; without artifacts, those of prepare.py. A first,
uncounted start brings the files into the page cache. Writes results/cpu_first_token.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from common import Record, peak_memory_bytes, percentiles  # noqa: E402
from prepare import SHAPES, VARIANTS, artifact_path  # noqa: E402

PROMPT, NEW = 448, 64


def child(artifact: str) -> None:
    """Load, tell when the first token is there, then one longer request; prints one JSON object."""
    from llmc.artifact.reader import open_unchecked
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.load import StartLedger, load
    from llmc.runtime.page_budget import bytes_of, demand_of
    from llmc.runtime.params import SamplingParams

    imported = time.monotonic()
    manifest = open_unchecked(artifact).manifest
    ledger, layout = StartLedger(), manifest.cache
    config = RuntimeConfig(max_requests=1, max_model_len=PROMPT + NEW)
    with load(artifact, config, ledger=ledger) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0))
        first = time.monotonic()
        llm.generate([list(range(300, 300 + PROMPT))], SamplingParams(max_tokens=NEW, ignore_eos=True))
    pages = demand_of(config, manifest.spec.max_context).pages_per_sequence(layout)
    told: dict[str, Any] = {"imported": imported, "first": first, "steps_s": ledger.steps}
    told["weight_bytes"] = sum(entry.size_bytes for entry in manifest.of_kind("weights"))
    told |= {"cache_bytes": bytes_of(layout, pages), "peak_memory_bytes": peak_memory_bytes()}
    print(json.dumps(told))


def start(artifact: Path) -> dict[str, Any]:
    """One start in a fresh process: what `child` tells, with seconds since the process was started."""
    began = time.monotonic()  # one clock for all processes of the machine
    command = [sys.executable, str(HERE / "first_token.py"), "--child", str(artifact)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told | {"import_s": told["imported"] - began, "first_token_s": told["first"] - began}


def measured(artifact: Path, repeats: int) -> dict[str, object]:
    """Medians over fresh processes, and what lies beyond weights and cache at the peak."""
    start(artifact)
    starts = [start(artifact) for _ in range(repeats)]
    last = starts[-1]
    peak = max(int(one["peak_memory_bytes"]) for one in starts)
    return {
        "first_token_s": percentiles([one["first_token_s"] for one in starts]),
        "import_s": percentiles([one["import_s"] for one in starts]),
        "steps_s": last["steps_s"],
        "weight_bytes": last["weight_bytes"],
        "cache_bytes": last["cache_bytes"],
        "peak_memory_bytes": peak,
        "beside_bytes": peak - last["weight_bytes"] - last["cache_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child)
        return
    artifacts: list[Path] = asked.artifacts or [
        artifact_path(shape, one) for shape in SHAPES for one in VARIANTS
    ]
    bench = Record("cpu_first_token")
    results: dict[str, object] = {}
    for artifact in artifacts:
        found: dict[str, Any] = measured(artifact, asked.repeats)
        results[artifact.stem] = found
        first, beside = found["first_token_s"]["p50"], found["beside_bytes"] / 1e6
        print(f"{artifact.stem:30} first token {first:6.2f} s, {beside:7.0f} MB beside weights and cache")
    print(bench.write(results))


if __name__ == "__main__":
    main()
