"""What a comparison can tell: equals, a planted slowdown, and how long four recipes take.

Run as `python bench/compare/bars.py [equals] [planted] [recipes]`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "bench")]

from common import Record  # noqa: E402

from llmc.artifact.reader import open_unchecked  # noqa: E402
from llmc.compiler.compare.measure import Work, measure_in_processes, side_ratios  # noqa: E402
from llmc.compiler.compare.runner import WorkerRunner  # noqa: E402
from llmc.compiler.compare.statistics import Ratio  # noqa: E402
from llmc.compiler.driver import compile_model  # noqa: E402
from llmc.compiler.quality import PROBE_TEXTS  # noqa: E402
from llmc.runtime.tokenizer import Tokenizer  # noqa: E402

WORKER = "llmc.compiler.compare.worker"
MODEL = REPOSITORY / "models" / "stories-7m"
RECIPES = ("none", "int8", "int4-fast", "int4")
RUNS, RUN_S = 20, 3.0
PLANTED_S, PLANTED_RUNS = 36.0, 3
SLOWDOWN = 1.05


def equals(folder: Path) -> dict[str, Any]:
    """Two copies of one artifact, each in a new process, measured RUNS times."""
    one, two = _copies(folder)
    runs: list[dict[str, Any]] = []
    for seed in range(RUNS):
        found = _measured(one, two, WORKER, RUN_S, seed)
        runs.append({**found.told, "false": [key for key, r in found.ratios.items() if r.is_different]})
        print(json.dumps(runs[-1]), flush=True)
    return {"runs": runs, "num_false": sum(len(run["false"]) for run in runs)}


def planted(folder: Path) -> dict[str, Any]:
    """The same artifact in an executor that is slower in decoding by a known share."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    one, two = _copies(folder)
    runs: list[dict[str, Any]] = []
    for seed in range(PLANTED_RUNS):
        found = _measured(one, two, "slow_worker", PLANTED_S, seed, slowdowns=(0.0, SLOWDOWN - 1))
        tpot = found.ratios["tpot_s"]
        is_found = tpot.is_different and tpot.ratio > 1
        runs.append({**found.told, "found": is_found, "error": round(tpot.ratio - SLOWDOWN, 4)})
        print(json.dumps(runs[-1]), flush=True)
    return {"slowdown": SLOWDOWN, "runs": runs}


class Measured(NamedTuple):
    """Ratios of the second side to the first, and what the result file says of the run."""

    ratios: Mapping[str, Ratio]
    told: dict[str, Any]


def _measured(
    one: Path,
    two: Path,
    module: str,
    budget_s: float,
    seed: int,
    slowdowns: tuple[float, float] = (0.0, 0.0),
) -> Measured:
    """What `llmc compare` does to two artifacts run by `module`, their logits aside. A module that plants
    slowdowns runs both, so that what planting itself costs is the same."""
    started = time.monotonic()
    tokenizer = Tokenizer.from_folder(open_unchecked(one).tokenizer_folder)
    prompts = tuple(tokenizer.encode(text) for text in PROBE_TEXTS[:3])
    work = Work(prompts=prompts, num_tokens=32, concurrency=4, rounds=5000, budget_s=budget_s)

    def opened(path: Path, slowdown: float) -> WorkerRunner:
        os.environ["LLMC_BENCH_SLOWDOWN"] = str(slowdown)
        return WorkerRunner(path, num_threads=1, max_requests=4, module=module)

    samples = measure_in_processes(
        {"one": partial(opened, one, slowdowns[0]), "two": partial(opened, two, slowdowns[1])},
        work,
        rng=random.Random(seed),
        clock=time.perf_counter,
        watch=lambda done, total, what: None,
    )
    ratios = side_ratios(samples["two"], samples["one"], rng=random.Random(seed))
    intervals = {key: [round(r.low, 4), round(r.ratio, 4), round(r.high, 4)] for key, r in ratios.items()}
    seconds = round(time.monotonic() - started, 1)
    return Measured(ratios, {"rounds": len(samples["one"].singles), "seconds": seconds, **intervals})


def recipes(folder: Path) -> dict[str, Any]:
    """Four recipes of the bundled model by the command, from nothing and once more."""
    command = [sys.executable, "-m", "llmc.cli", "compare", str(MODEL), "--target", "cpu", "--json"]
    command += [part for recipe in RECIPES for part in ("--recipe", recipe)]
    variables = {**os.environ, "LLMC_CACHE_DIR": str(folder / "cache"), "LLMC_CACHE_BYTES": str(4 << 30)}
    found: dict[str, Any] = {"recipes": RECIPES}
    for name in ("from_nothing", "from_cache"):
        started = time.monotonic()
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = {"wall_s": time.monotonic() - started, "rounds": json.loads(done.stdout)["rounds"]}
        print(name, json.dumps(found[name]), flush=True)
    return found


def _copies(folder: Path) -> tuple[Path, Path]:
    one, two = folder / "one.llmc", folder / "two.llmc"
    compile_model(MODEL, output=one, quant="int4-fast", target="cpu", verify="off")
    shutil.copytree(one, two)
    return one, two


def main(names: list[str]) -> None:
    """Measure what is named, or everything; each part has a result of its own."""
    parts = {"equals": equals, "planted": planted, "recipes": recipes}
    for name in names or list(parts):
        record = Record(f"compare_{name}")
        with tempfile.TemporaryDirectory(prefix="llmc-bars-") as folder:
            print(record.write(parts[name](Path(folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
