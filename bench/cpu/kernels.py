"""Rates of the CPU kernels, as fractions of the streaming rate and of the integer peak of the same run.

python bench/cpu/kernels.py [--threads N] [--repeats N] [--level NAME] [--processor-time]
Writes results/cpu_kernels.json. On a busy machine --processor-time still compares compute with its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import Record  # noqa: E402

from llmc.kernels.levels import LEVELS, NUMERIC_FLAGS, supported_levels  # noqa: E402

LIMITS = {"GB/s": "streaming_read", "GOP/s": "integer_peak"}


def cpu_features() -> frozenset[str]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "flags:")
    return frozenset(flags.partition(":")[2].split())


def build_program(level_name: str, folder: Path) -> Path:
    """The bench program for an ISA level, compiled into `folder`."""
    level = next(level for level in LEVELS if level.name == level_name)
    program = folder / "kernels"
    include = f"-I{HERE.parents[1] / 'kernels' / 'cpu'}"
    command = ["c++", "-O2", "-w", "-pthread", *NUMERIC_FLAGS, *level.flags, include]
    subprocess.run([*command, str(HERE / "kernels.cpp"), "-o", str(program)], check=True)
    return program


def run_program(
    program: Path, threads: int, repeats: int, *, processor_time: bool = False, only: str = "all"
) -> dict[str, dict[str, float]]:
    """The program's own report; it prints JSON. `only` "limits" leaves the kernels out."""
    clock = "cpu" if processor_time else "wall"
    command = [str(program), str(threads), str(repeats), clock, only]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    here = [level.name for level in supported_levels(cpu_features())]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--level", choices=here, default=here[-1])
    parser.add_argument("--processor-time", action="store_true", help="one thread, its own time only")
    asked = parser.parse_args()
    threads = 1 if asked.processor_time else asked.threads
    with tempfile.TemporaryDirectory() as folder:
        program = build_program(asked.level, Path(folder))
        bench = Record("cpu_kernels")
        measured = run_program(program, threads, asked.repeats, processor_time=asked.processor_time)
    for name, one in measured.items():
        limit = measured[LIMITS[one["unit"]]]["p50"]
        if limit > 0:
            one["of_limit"] = round(one["p50"] / limit, 3)
        print(f"{name:34} {one['p50']:9.1f} {one['unit']:6} {one.get('of_limit', ''):>6}")
    results = {"level": asked.level, "threads": threads, "rates": measured}
    path = bench.write({**results, "clock": "processor" if asked.processor_time else "wall"})
    print(path)


if __name__ == "__main__":
    main()
