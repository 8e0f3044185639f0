"""Decoding with speculation against decoding without, by batch size: interleaved pairs of short runs, equal
requests on one executor, as many as the time allows, since one pair tells little where others compute, too.
Drafts from a draft artifact, or from the text itself. Bars: 1.4 times at batch 1 with drafts; 0.97 always."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Record, median_interval

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.llm import LLM
from llmc.runtime.load import load
from llmc.runtime.params import SamplingParams

PROMPTS = (
    "Once upon a time there was a little girl",
    "The dog ran to the park and",
    "Tom had a red ball. One day",
    "It was a sunny day and Lily",
)


def decode_s(llm: LLM, batch: int, params: SamplingParams) -> tuple[float, float, list[tuple[int, ...]]]:
    """Wall seconds from the first to the last token of `batch` requests together, the processor's seconds of
    the whole, and the tokens."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]
    started, started_cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    first_s = min(output.ttft_s or 0.0 for output in outputs)
    return ended - started - first_s, ended_cpu - started_cpu, [output.token_ids for output in outputs]


def compare(llm: LLM, batch: int, params: SamplingParams, rounds: int, seconds: float) -> dict[str, object]:
    """Ratios of seconds, plain over drafted, of interleaved pairs after one that is not counted: as many as
    begin within `seconds`, and at least `rounds`. Both are one engine, which speculates or does not: two
    equal ones differ by up to a twentieth, for as long as a process runs, by where their threads and objects
    lie."""
    walls: list[float] = []
    processors: list[float] = []
    plain_s: list[float] = []
    tokens: list[list[tuple[int, ...]]] = []
    ends_s = time.perf_counter() + seconds
    number = 0
    while number <= rounds or time.perf_counter() < ends_s:
        wall: dict[str, float] = {}
        processor: dict[str, float] = {}
        tokens = []
        for name in ("plain", "drafted") if number % 2 else ("drafted", "plain"):
            llm.engine.speculates = name == "drafted"
            wall[name], processor[name], found = decode_s(llm, batch, params)
            tokens.append(found)
        if tokens[0] != tokens[1]:
            raise AssertionError(f"tokens differ at batch {batch}")
        if number:
            walls.append(wall["plain"] / wall["drafted"])
            processors.append(processor["plain"] / processor["drafted"])
            plain_s.append(wall["plain"])
        number += 1
    return {
        "wall": median_interval(walls),
        "processor": median_interval(processors),
        "plain_tokens_per_s": batch * (len(tokens[0][0]) - 1) / statistics.median(plain_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("draft", type=Path, nargs="?", help="a draft artifact; without one, n-grams")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="least number of pairs")
    parser.add_argument("--seconds", type=float, default=8.0, help="of pairs for each batch size")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--name", help="of the result; default: speculation_draft or speculation_ngram")
    arguments = parser.parse_args()
    kind = "ngram" if arguments.draft is None else "draft"
    record = Record(arguments.name or f"speculation_{kind}")
    config = RuntimeConfig(
        max_requests=max(arguments.batches),
        num_threads=arguments.threads,
        prefix_cache=False,
        speculation="none" if arguments.draft else "ngram",
    )
    results: dict[str, object] = {"bar_batch_1": 1.4, "bar_any": 0.97, "tokens": arguments.tokens}
    with load(arguments.artifact, config, draft=arguments.draft) as llm:
        for name, temperature in (("greedy", 0.0), ("seeded", 0.8)):
            params = SamplingParams(
                temperature=temperature, seed=3, max_tokens=arguments.tokens, ignore_eos=True
            )
            results[name] = {
                str(batch): compare(llm, batch, params, arguments.rounds, arguments.seconds)
                for batch in arguments.batches
            }
        stats = llm.engine.stats
        results["drafted_at"], results["accepted_at"] = stats.drafted_at, stats.accepted_at
    path = record.write(results)
    print(json.dumps(results, indent=2))
    print(path)


if __name__ == "__main__":
    main()
