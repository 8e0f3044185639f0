"""What sampling costs a decode step: milliseconds a step for each way to choose tokens.

python bench/cpu/sampling.py [ARTIFACT] [--batches 1,8,32] [--rounds N]; without an artifact, the fast one of
prepare.py, whose vocabulary has 151936 tokens. Ways take turns. Writes results/cpu_sampling.json.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from common import Record, percentiles  # noqa: E402
from prepare import SHAPES, artifact_path  # noqa: E402

from llmc.runtime.config import RuntimeConfig  # noqa: E402
from llmc.runtime.llm import LLM  # noqa: E402
from llmc.runtime.load import load  # noqa: E402
from llmc.runtime.params import SamplingParams  # noqa: E402

PROMPT, NEW = 16, 24


def ways(length: int) -> dict[str, SamplingParams]:
    """Each way to choose, for answers of `length` tokens."""

    def way(**settings: float | int) -> SamplingParams:
        chosen = {"temperature": 0.8, **settings}
        return SamplingParams(max_tokens=length, ignore_eos=True, **chosen)  # type: ignore[arg-type]

    return {
        "greedy": way(temperature=0.0),
        "temperature": way(),
        "top_k": way(top_k=40),
        "top_p": way(top_p=0.95),
        "min_p": way(min_p=0.05),
        "penalties": way(repetition_penalty=1.1, frequency_penalty=0.2),
        "all": way(top_k=40, top_p=0.95, min_p=0.05, repetition_penalty=1.1, frequency_penalty=0.2),
        "logprobs": way(temperature=0.0, logprobs=5),
    }


def step_seconds(llm: LLM, draw: random.Random, batch: int, way: str) -> float:
    """Seconds of one decode step; the time of the prompts is taken off."""
    seconds: list[float] = []
    for length in (1, NEW + 1):
        prompts = [[draw.randrange(5, 15000) for _ in range(PROMPT)] for _ in range(batch)]
        began = time.perf_counter()
        llm.generate(prompts, ways(length)[way])
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", nargs="?", type=Path, default=artifact_path(next(iter(SHAPES)), "fast"))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    draw = random.Random(int.from_bytes(os.urandom(4), "little"))
    bench = Record("cpu_sampling")
    results: dict[str, object] = {}
    with load(asked.artifact, RuntimeConfig(max_requests=32, max_model_len=128)) as llm:
        for batch in map(int, asked.batches.split(",")):
            found: dict[str, list[float]] = {name: [] for name in ways(1)}
            for _ in range(asked.rounds):
                for name, seconds in found.items():
                    seconds.append(step_seconds(llm, draw, batch, name))
            medians = {name: percentiles(seconds) for name, seconds in found.items()}
            results[f"batch_{batch}"] = {"step_s": medians}
            print(batch, {name: f"{one['p50'] * 1e3:.2f} ms" for name, one in medians.items()})
    print(bench.write({"artifact": asked.artifact.stem, "steps": results}))


if __name__ == "__main__":
    main()
