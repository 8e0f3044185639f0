"""Continuous batching against one request at a time on the same artifact: 16 requests with prompts and
answers of different lengths, in interleaved pairs of runs. Bar: 4 times the throughput."""

from __future__ import annotations

import argparse
import json
import queue
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Record, median_interval

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.llm import LLM
from llmc.runtime.load import load
from llmc.runtime.outputs import StreamChunk
from llmc.runtime.params import SamplingParams

BAR = 4.0
Work = list[tuple[list[int], SamplingParams]]


def make_work(count: int, vocab_size: int, longest: int, rng: random.Random) -> Work:
    """Prompts of a sixteenth to a quarter of `longest` tokens, answers of an eighth to a half."""
    work: Work = []
    for _ in range(count):
        prompt = [rng.randrange(3, vocab_size) for _ in range(rng.randint(longest // 16, longest // 4))]
        length = rng.randint(longest // 8, longest // 2)
        work.append((prompt, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)))
    return work


def run(llm: LLM, work: Work) -> dict[int, tuple[int, ...]]:
    """Everything at once: the tokens of each request."""
    told: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    tokens: dict[int, list[int]] = {number: [] for number in range(len(work))}

    def take(number: int, chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, Exception):
            told.put(chunk)
            return
        tokens[number].extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            told.put(None)

    for number, (prompt, params) in enumerate(work):
        llm.submit(prompt, params, partial(take, number))
    for _ in work:
        error = told.get()
        if error is not None:
            raise error
    return {number: tuple(each) for number, each in tokens.items()}


def compare(llm: LLM, work: Work, rounds: int) -> dict[str, object]:
    """Seconds of each way, and their ratios. RuntimeError when tokens differ."""
    apart_s: list[float] = []
    together_s: list[float] = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        apart = {place: run(llm, [each])[0] for place, each in enumerate(work)}
        between = time.perf_counter()
        together = run(llm, work)
        ended = time.perf_counter()
        if apart != together:
            raise RuntimeError("tokens differ between the two ways")
        if number:
            apart_s.append(between - started)
            together_s.append(ended - between)
    num_tokens = sum(map(len, together.values()))
    ratios = [alone / joined for alone, joined in zip(apart_s, together_s, strict=True)]
    return {
        "num_prompt_tokens": sum(len(prompt) for prompt, _ in work),
        "num_output_tokens": num_tokens,
        "one_at_a_time_tokens_per_s": num_tokens / statistics.median(apart_s),
        "together_tokens_per_s": num_tokens / statistics.median(together_s),
        "ratio": median_interval(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt and its answer: scale")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    record = Record("mixed_batching")
    results: dict[str, object] = {"bar": BAR, "requests": arguments.requests, "threads": arguments.threads}
    for path in arguments.artifacts:
        config = RuntimeConfig(
            max_requests=arguments.requests,
            max_model_len=arguments.longest,
            num_threads=arguments.threads,
            prefix_cache=False,
        )
        with load(path, config) as llm:
            work = make_work(arguments.requests, llm.limits.vocab_size, arguments.longest, random.Random(7))
            results[path.name] = compare(llm, work, arguments.rounds)
    written = record.write(results)
    print(json.dumps(results, indent=2))
    print(written)


if __name__ == "__main__":
    main()
