"""Scheduler and bookkeeping per step at a number of running requests, against an executor that answers at
once. What the executor itself takes is measured apart and not counted. Bar: 0.3 ms median at 64."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

from common import Record, percentiles

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import NullExecutor, simulated_caps
from llmc.runtime.protocol import RowDiff, SamplingState, StepPlan, StepResult, Ticket
from llmc.runtime.request import Request

BAR_S = 0.3e-3


class TimedExecutor(NullExecutor):
    """Adds up the seconds spent inside of the executor."""

    inside_s = 0.0

    def apply(self, diff: RowDiff) -> None:
        started = time.perf_counter()
        super().apply(diff)
        self.inside_s += time.perf_counter() - started

    def submit(self, plan: StepPlan) -> Ticket:
        started = time.perf_counter()
        ticket = super().submit(plan)
        self.inside_s += time.perf_counter() - started
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        started = time.perf_counter()
        result = super().collect(ticket)
        self.inside_s += time.perf_counter() - started
        return result


def measure(num_requests: int, num_steps: int, num_waiting: int, config: RuntimeConfig) -> dict[str, float]:
    """Seconds per step, of decode steps with `num_requests` running and `num_waiting` in the queue."""
    groups = [("full", 0, 32, 16384), ("window", 128, 32, 16384)]
    caps = simulated_caps(
        groups=groups, vocab_size=32000, max_context=8192, max_rows=num_requests, max_tokens=8192
    )
    executor = TimedExecutor(caps)
    engine = Engine(executor, replace(config, max_requests=num_requests))
    for number in range(num_requests + num_waiting):
        prompt = tuple((number * 31 + index * 7) % 32000 for index in range(400))
        engine.add_request(
            Request(
                request_id=number,
                prompt_token_ids=prompt,
                max_tokens=num_steps + 64,
                sampling=SamplingState(),
                stop_token_ids=frozenset({0}),
                deadline_s=engine.now_s() + 3600,
            )
        )
    while engine.num_running < num_requests or engine.stats.num_steps < 20:
        engine.step()
    seconds: list[float] = []
    for _ in range(num_steps - 40):
        inside = executor.inside_s
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started - (executor.inside_s - inside))
    assert engine.num_running == num_requests
    return percentiles(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--waiting", type=int, default=256)
    arguments = parser.parse_args()
    record = Record("step_overhead")
    results: dict[str, object] = {"bar_s": BAR_S, "num_steps": arguments.steps}
    for num_requests in (1, 8, 64):
        name = f"requests_{num_requests}"
        results[name] = measure(num_requests, arguments.steps, arguments.waiting, RuntimeConfig())
    ngram = RuntimeConfig(speculation="ngram")
    results["requests_64_ngram"] = measure(64, arguments.steps, arguments.waiting, ngram)
    path = record.write(results)
    print(json.dumps(results, indent=2))
    print(path)


if __name__ == "__main__":
    main()
