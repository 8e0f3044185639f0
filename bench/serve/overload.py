"""Goodput under four times the load a server can bear, against its goodput at capacity, in turns on one
server. No model: a simulated executor whose steps take a fixed time. Bar: 95 %, and `Retry-After` with every
refusal."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record

BAR = 0.95
ROWS = 8
STEP_S = 0.02
SIZE = "uniform:8-8,10-30"
MEAN_S = 21 * STEP_S
# What a request may take to count: twice its own steps and as many in the queue that it may have to wait for.
E2E_LIMIT_S = 2 * 2 * MEAN_S


def serve() -> None:
    """The server's process: prints its port when it is ready."""
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps, simulated_spec
    from llmc.runtime.llm import LLM
    from llmc.runtime.server.channel import LocalChannel
    from llmc.runtime.server.config import ServerConfig
    from llmc.runtime.server.process import Server, listen
    from llmc.runtime.server.state import make_state

    class Timed(SimulatedExecutor):
        def submit(self, plan):
            time.sleep(STEP_S)
            return super().submit(plan)

    caps = simulated_caps(groups=(("full", 0, 16, 64),), max_rows=ROWS)
    config = ServerConfig(port=0, max_waiting=ROWS)
    llm = LLM(Timed(caps), None, simulated_spec(caps), RuntimeConfig(max_requests=ROWS))
    state = make_state(config, [("timed", LocalChannel(llm), None)])
    server = Server(state, listen(config), lambda: print(server.port, flush=True))
    server.run()


def measure(port: int, rounds: int, seconds: float) -> dict[str, object]:
    """In each round: goodput of a closed loop that keeps rows and queue full, then of arrivals at four times
    that rate. What counts has met `E2E_LIMIT_S`."""
    from llmc.runtime.bench.client import Endpoint

    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", model="timed")
    pairs = [measure_round(endpoint, seconds, 2 * index) for index in range(rounds)]
    return {
        "bar": BAR,
        "e2e_limit_s": E2E_LIMIT_S,
        "capacity_per_s": statistics.fmean(each["capacity_per_s"] for each in pairs),
        "goodput_per_s": statistics.fmean(each["goodput_per_s"] for each in pairs),
        "share": sum(each["goodput_per_s"] for each in pairs) / sum(each["capacity_per_s"] for each in pairs),
        **{
            name: sum(each[name] for each in pairs)
            for name in ("refused", "refused_without_advice", "other_errors")
        },
        "rounds": pairs,
    }


def measure_round(endpoint, seconds: float, seed: int) -> dict[str, float]:
    """One pair of runs, each from when rows and queue are full to when the last request has come."""
    from llmc.runtime.bench.measures import Limits
    from llmc.runtime.bench.measures import measure as measures_of
    from llmc.runtime.bench.runs import Load, offer

    limits = Limits(e2e_s=E2E_LIMIT_S)
    count = int(ROWS / MEAN_S * seconds) + 2 * ROWS
    load = Load(lengths=SIZE, num_requests=count, concurrency=2 * ROWS, vocab_size=28, seed=seed)
    closed = offer(endpoint, load)
    capacity_per_s = steady_goodput(closed, limits, max(sample.sent_s for sample in closed))
    offered = 4 * capacity_per_s
    count = int(offered * (seconds + 2 * MEAN_S))
    load = Load(lengths=SIZE, num_requests=count, rate_per_s=offered, vocab_size=28, seed=seed + 1)
    flood = offer(endpoint, load)
    refused = [sample for sample in flood if sample.status in (429, 503)]
    over, capacity = measures_of(flood, limits, offered), measures_of(closed, limits)
    return {
        "capacity_per_s": capacity_per_s,
        "offered_per_s": offered,
        "goodput_per_s": steady_goodput(flood, limits, max(sample.scheduled_s for sample in flood)),
        "refused": len(refused),
        "refused_without_advice": sum(sample.retry_after_s is None for sample in refused),
        "other_errors": sum(sample.error is not None and sample.status not in (429, 503) for sample in flood),
        "ttft_s_p99": over.ttft_s.p99 if over.ttft_s else 0.0,
        "e2e_s_p99": over.e2e_s.p99 if over.e2e_s else 0.0,
        "e2e_s_p99_at_capacity": capacity.e2e_s.p99 if capacity.e2e_s else 0.0,
    }


def steady_goodput(samples, limits, until_s: float) -> float:
    """Requests a second that ended well and in time, behind the first two mean times and until `until_s`."""
    ends = [s.event_s[-1] for s in samples if s.error is None and limits.are_met(s)]
    return sum(2 * MEAN_S <= end < until_s for end in ends) / (until_s - 2 * MEAN_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="Of each of the two runs of a round.")
    parser.add_argument("--no-record", action="store_true", help="Print only.")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    record = Record("serve_overload")
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        results = measure(int(process.stdout.readline()), arguments.rounds, arguments.seconds)
    finally:
        process.terminate()
        process.wait(30)
    if not arguments.no_record:
        record.write(results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
