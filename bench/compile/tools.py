"""What the tools that explain a compile cost: the answer to `will it fit`, a bisection, and verification.

usage: tools.py fit|bisect|verify [--model FOLDER] [--quant PRESET]... [--rounds N] [--name NAME]

Every measurement is a command in a process of its own, start to end. `cpu_s` is its processor time, which
neighbours on the machine disturb less than they disturb seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench"))
from common import Record, percentiles  # noqa: E402 - the folder above must be on the path first

MODEL = REPOSITORY / "models" / "stories-7m"
# The configurations that the tests of the same commands ask about.
LARGE = REPOSITORY / "tests" / "data" / "large_configs.json"


def main() -> None:
    """Run one part and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("fit", "bisect", "verify"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--quant", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="")
    asked = parser.parse_args()
    record = Record(asked.name or f"tools_{asked.part}")
    parts = {"fit": measure_fit, "bisect": measure_bisect, "verify": measure_verify}
    results = parts[asked.part](asked.model.resolve(), asked.quant or ["int4"], asked.rounds)
    print(json.dumps(results, indent=1))
    print(record.write(results))


def measure_fit(model: Path, presets: list[str], rounds: int) -> dict[str, object]:
    """Both commands that answer from a config alone; the first does not fit and looks for ways."""
    questions = {
        "inspect_fit": ("inspect", "--fit", "--memory", "24GB", "--context", "8192"),
        "compile_dry_run": ("compile", "--dry-run", "--quant", presets[0]),
    }
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, config in json.loads(LARGE.read_text(encoding="utf-8")).items():
            folder = Path(work) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for question, (command, *options) in questions.items():
                runs = [_run(command, folder, *options) for _ in range(rounds)]
                found[f"{name} {question}"] = _times(runs)
    return found


def measure_bisect(model: Path, presets: list[str], rounds: int) -> dict[str, object]:
    """Whole recipes on a sound model: nothing can be left out, so no bisection of it takes longer."""
    found: dict[str, object] = {}
    for preset in presets:
        runs = [_run("bisect", model, "--quant", preset) for _ in range(rounds)]
        found[f"{model.name} {preset}"] = {**_times(runs), "clean": runs[0]["answer"]["ok"]}
    return found


def measure_verify(model: Path, presets: list[str], rounds: int) -> dict[str, object]:
    """Compiles with and without verification, each first in turn, nothing cached; `cost` is the share that it
    adds."""
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as work:
        for preset in presets:
            runs: dict[str, list[dict]] = {"off": [], "numerics": []}
            for turn in range(rounds):
                for level in sorted(runs, reverse=turn % 2 == 1):
                    options = ("--quant", preset, "--verify", level, "--no-cache")
                    os.sync()  # what the one before wrote is not this one's to wait for
                    runs[level].append(_run("compile", model, *options, "-o", f"{work}/a.llmc"))
                    shutil.rmtree(f"{work}/a.llmc")
            medians = {
                level: {key: percentiles([run[key] for run in done])["p50"] for key in ("wall_s", "cpu_s")}
                for level, done in runs.items()
            }
            found[f"{model.name} {preset}"] = {
                **{level: _times(done) | {"stages_s": _stages(done)} for level, done in runs.items()},
                "cost": {
                    key: round(medians["numerics"][key] / medians["off"][key] - 1, 3)
                    for key in ("wall_s", "cpu_s")
                },
            }
    return found


def _run(*arguments: object) -> dict:
    """One command's seconds, processor seconds and JSON answer."""
    before, started = _children_s(), time.perf_counter()
    command = [sys.executable, "-m", "llmc.cli", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY.parent, check=True)
    wall = time.perf_counter() - started
    return {"wall_s": wall, "cpu_s": _children_s() - before, "answer": json.loads(done.stdout)}


def _times(runs: list[dict]) -> dict[str, object]:
    return {
        key: {name: round(value, 2) for name, value in percentiles([run[key] for run in runs]).items()}
        for key in ("wall_s", "cpu_s")
    }


def _stages(runs: list[dict]) -> dict[str, float]:
    """The median seconds of each stage that a compile tells of."""
    names = [entry["stage"] for entry in runs[0]["answer"]["ledger"]]
    seconds = [{entry["stage"]: entry["seconds"] for entry in run["answer"]["ledger"]} for run in runs]
    return {name: round(percentiles([run[name] for run in seconds])["p50"], 2) for name in names}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
