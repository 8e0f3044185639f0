"""What a user gets from one machine: decoding by batch, prefill, 16 mixed requests; llmc beside others.

python bench/cpu/end_to_end.py [NAME=KIND:MODEL[:PYTHON] ...] [--shape SHAPE] [--rounds N] [--threads N]
Without engines: the artifacts of prepare.py, then those that LLMC_BENCH_PEERS names in the same form.
An empty --batches leaves decoding out, for engines that take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from common import Record, percentiles  # noqa: E402
from prepare import SHAPES, VARIANTS, artifact_path  # noqa: E402

from kernels import build_program, cpu_features, run_program  # noqa: E402
from llmc.kernels.levels import supported_levels  # noqa: E402

BATCHES = (1, 2, 4, 8, 16, 32)
PROMPT, NEW, PREFILL = 32, 48, 512
LIMITS = ("streaming_read", "integer_peak")


class Engine:
    """A process of engines.py, asked one thing at a time."""

    def __init__(self, name: str, kind: str, model: str, python: str, threads: int) -> None:
        self.name = name
        command = [python, str(HERE / "engines.py"), kind, model, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load_s = self._answer()["load_s"]
        self.peak_memory_bytes = 0

    def seconds(self, prompts: list[list[int]], lengths: list[int]) -> float:
        """Wall seconds for all prompts together. Raises RuntimeError when tokens are missing."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "lengths": lengths}), file=self._process.stdin, flush=True)
        answer = self._answer()
        if answer["tokens"] != sum(lengths):
            raise RuntimeError(f"{self.name} gave {answer['tokens']} of {sum(lengths)} tokens")
        self.peak_memory_bytes = int(answer["peak_memory_bytes"])
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.name} ended with {self._process.wait()}; run engines.py by hand to see why"
            )
        return json.loads(line)


def prompts_of(draw: random.Random, lengths: list[int]) -> list[list[int]]:
    """Fresh prompts, so that no prefix is known; ids of ordinary tokens."""
    return [[draw.randrange(300, 15000) for _ in range(length)] for length in lengths]


def mixed_shape(num_requests: int = 16) -> tuple[list[int], list[int]]:
    """Lengths of prompts (32 to 256) and of answers (32 to 128), always the same."""
    draw = random.Random(1234)
    pairs = [(draw.randint(32, 256), draw.randint(32, 128)) for _ in range(num_requests)]
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def ask_everything(engine: Engine, draw: random.Random, batches: tuple[int, ...]) -> dict[str, float]:
    """One round: rates in tokens a second. The time of the prompts is taken off decoding's."""
    rates: dict[str, float] = {}
    for batch in batches:
        short, long = (
            engine.seconds(prompts_of(draw, [PROMPT] * batch), [length] * batch) for length in (1, NEW + 1)
        )
        if long > short:  # a machine that pauses in the shorter one has told nothing
            rates[f"decode_{batch}"] = batch * NEW / (long - short)
    rates["prefill"] = PREFILL / engine.seconds(prompts_of(draw, [PREFILL]), [1])
    prompts, answers = mixed_shape()
    rates["mixed_16"] = sum(answers) / engine.seconds(prompts_of(draw, prompts), answers)
    return rates


def limits(program: Path, threads: int) -> dict[str, float]:
    """Streaming rate (GB/s) and integer peak (GOP/s) of this moment."""
    measured = run_program(program, threads, 15, only="limits")
    return {name: measured[name]["p50"] for name in LIMITS}


def parse_engine(text: str, threads: int) -> Engine:
    """NAME=KIND:MODEL[:PYTHON]"""
    name, _, rest = text.partition("=")
    kind, model, *python = rest.split(":")
    return Engine(name, kind, model, python[0] if python else sys.executable, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="NAME=KIND:MODEL[:PYTHON]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--record", help="name of the result; otherwise cpu_end_to_end_SHAPE")
    parser.add_argument("--shape", choices=list(SHAPES), default=next(iter(SHAPES)))
    asked = parser.parse_args()
    texts = asked.engines or [f"{name}=llmc:{artifact_path(asked.shape, name)}" for name in VARIANTS]
    texts += [] if asked.engines else shlex.split(os.environ.get("LLMC_BENCH_PEERS", ""))
    batches = tuple(int(batch) for batch in asked.batches.split(",") if batch)
    engines = [parse_engine(text, asked.threads) for text in texts]
    draw = random.Random(int.from_bytes(os.urandom(4), "little"))
    for engine in engines:
        engine.seconds(prompts_of(draw, [PREFILL]), [4])
    folder = tempfile.TemporaryDirectory()
    program = build_program(supported_levels(cpu_features())[-1].name, Path(folder.name))
    bench = Record(asked.record or f"cpu_end_to_end_{asked.shape}")
    rates: dict[str, dict[str, list[float]]] = {engine.name: {} for engine in engines}
    measured: dict[str, list[float]] = {name: [] for name in LIMITS}
    for _ in range(asked.rounds):
        for name, rate in limits(program, asked.threads).items():
            measured[name].append(rate)
        for engine in engines:
            for name, rate in ask_everything(engine, draw, batches).items():
                rates[engine.name].setdefault(name, []).append(rate)
    results: dict[str, object] = {
        "limits": {name: percentiles(values) for name, values in measured.items()},
        "threads": asked.threads,
        "commands": texts,
        "engines": {
            engine.name: {
                "load_s": engine.load_s,
                "peak_memory_bytes": engine.peak_memory_bytes,
                "tokens_per_s": {name: percentiles(values) for name, values in rates[engine.name].items()},
            }
            for engine in engines
        },
    }
    for engine in engines:
        engine.close()
    folder.cleanup()
    print_table(rates, measured)
    print(bench.write(results))


def print_table(rates: dict[str, dict[str, list[float]]], measured: dict[str, list[float]]) -> None:
    """Medians, an engine a line."""
    columns = list(next(iter(rates.values())))
    print(f"{'':20}" + "".join(f"{column:>11}" for column in columns))
    for name, own in rates.items():
        cells = [
            f"{percentiles(own[column])['p50']:11.1f}" if column in own else f"{'-':>11}"
            for column in columns
        ]
        print(f"{name:20}" + "".join(cells))
    print({name: percentiles(values)["p50"] for name, values in measured.items()})


if __name__ == "__main__":
    main()
