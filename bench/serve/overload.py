"""Goodput under four times the load a server can bear, against its goodput at capacity. No model: a simulated
executor whose steps take a fixed time. Bar: 95 %, and `Retry-After` with every refusal."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record

BAR = 0.95
ROWS = 8
STEP_S = 0.01
SIZE = "fixed:8,20"


def serve() -> None:
    """The server's process: prints its port when it is ready."""
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
    from llmc.runtime.llm import LLM
    from llmc.runtime.server.channel import LocalChannel
    from llmc.runtime.server.config import ServerConfig
    from llmc.runtime.server.process import Server, listen
    from llmc.runtime.server.state import make_state
    from llmc.spec.model import ModelSpec

    class Timed(SimulatedExecutor):
        def submit(self, plan):
            time.sleep(STEP_S)
            return super().submit(plan)

    caps = simulated_caps(groups=(("full", 0, 16, 64),), max_rows=ROWS)
    spec = ModelSpec(
        family="simulated",
        architecture="Simulated",
        num_layers=1,
        hidden_size=1,
        vocab_size=29,
        max_context=128,
        compute_dtype="float32",
        tied_head=False,
        num_parameters=0,
        attention=(),
    )
    config = ServerConfig(port=0, max_waiting=ROWS)
    llm = LLM(Timed(caps), None, spec, RuntimeConfig(max_requests=ROWS))
    state = make_state(config, [("timed", LocalChannel(llm), None)])
    server = Server(state, listen(config), lambda: print(server.port, flush=True))
    server.run()


def measure(port: int, seconds: float) -> dict[str, object]:
    """Goodput of a closed loop that keeps rows and queue full, then of four times its rate."""
    from llmc.runtime.bench.client import Endpoint
    from llmc.runtime.bench.measures import Limits
    from llmc.runtime.bench.measures import measure as measures_of
    from llmc.runtime.bench.runs import Load, offer

    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", model="timed")
    rate = ROWS / (21 * STEP_S)
    count = int(rate * seconds)
    closed = offer(endpoint, Load(lengths=SIZE, num_requests=count, concurrency=2 * ROWS, vocab_size=28))
    capacity = measures_of(closed, Limits())
    offered = 4 * capacity.goodput_per_s
    flood = offer(
        endpoint,
        Load(lengths=SIZE, num_requests=int(offered * seconds), rate_per_s=offered, vocab_size=28, seed=1),
    )
    over = measures_of(flood, Limits(), offered)
    refused = [sample for sample in flood if sample.status in (429, 503)]
    return {
        "bar": BAR,
        "capacity_per_s": capacity.goodput_per_s,
        "offered_per_s": offered,
        "goodput_per_s": over.goodput_per_s,
        "share": over.goodput_per_s / capacity.goodput_per_s,
        "refused": len(refused),
        "refused_without_advice": sum(sample.retry_after_s is None for sample in refused),
        "other_errors": sum(sample.error is not None and sample.status not in (429, 503) for sample in flood),
        "ttft_s_p99": over.ttft_s.p99 if over.ttft_s else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
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
        results = measure(int(process.stdout.readline()), arguments.seconds)
    finally:
        process.terminate()
        process.wait(30)
    if not arguments.no_record:
        record.write(results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
