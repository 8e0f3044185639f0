"""The process behind `WorkerRunner`: loads one artifact and answers orders, a JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ...runtime.config import RuntimeConfig
from ...runtime.llm import LLM
from ...runtime.load import load
from ...runtime.outputs import GenerationOutput
from ...runtime.params import SamplingParams
from ...spec.errors import LlmcError


def main(path: str, num_threads: str, max_requests: str) -> None:
    """Serve orders from stdin until it is closed."""
    bind(int(num_threads))
    config = RuntimeConfig(
        prefix_cache=False, num_threads=int(num_threads), max_requests=max(1, int(max_requests))
    )
    try:
        started = time.perf_counter()
        with load(path, config) as llm:
            facts = {"load_s": time.perf_counter() - started, "peak_bytes": peak_bytes()}
            _say({**facts, "executor": llm.executor_name})
            for line in sys.stdin:
                _say(_obey(llm, json.loads(line)))
    except LlmcError as error:
        _say({"error": error.as_dict(), "kind": type(error).__name__})


def bind(num_threads: int) -> None:
    """Run on as many of the cores as there are threads, the same for every side: what else those cores do
    then slows all alike, wherever the system would have put each. 0 threads are one a core."""
    cores = sorted(os.sched_getaffinity(0))
    if 0 < num_threads < len(cores):
        os.sched_setaffinity(0, cores[-num_threads:])


def _obey(llm: LLM, order: dict[str, Any]) -> dict[str, Any]:
    match order["do"]:
        case "single":
            (output,) = llm.generate([order["prompt"]], _params(order["num_tokens"]))
            ttft, tpot = _times(output)
            return {"ttft_s": ttft, "tpot_s": tpot, "token_ids": output.token_ids}
        case "batch":
            started = time.perf_counter()
            outputs = llm.generate(order["prompts"], _params(order["num_tokens"]))
            wall = time.perf_counter() - started
            made = sum(len(output.token_ids) for output in outputs)
            return {"wall_s": wall, "output_tokens": made, "times": [_times(output) for output in outputs]}
        case "score":
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=True)
            outputs = llm.generate(order["prompts"], params)
            return {"logprobs": [output.prompt_logprobs[-1].logprob for output in outputs]}
        case _:
            return {"peak_bytes": peak_bytes()}


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def _times(output: GenerationOutput) -> tuple[float, float]:
    """Seconds to the first token, and per token behind it (0 where there is none)."""
    return output.ttft_s or 0.0, output.tpot_s or 0.0


def peak_bytes(path: Path = Path("/proc/self/status")) -> int:
    """The largest resident size of this process so far."""
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
