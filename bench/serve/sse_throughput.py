"""Tokens per second through HTTP and server-sent events, with an engine that answers at once: what remains is
engine, server and a raw asyncio client on the same machine. Bar: 5,000 tokens/s with 64 clients."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record, percentiles

BAR_TOKENS_PER_S = 5000


def serve() -> None:
    """The server's process: prints its port when it is ready."""
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.executors.simulated import NullExecutor, simulated_caps, simulated_spec
    from llmc.runtime.llm import LLM
    from llmc.runtime.server.channel import LocalChannel
    from llmc.runtime.server.config import ServerConfig
    from llmc.runtime.server.process import Server, listen
    from llmc.runtime.server.state import make_state
    from llmc.runtime.tokenizer import Tokenizer

    folder = Path(__file__).resolve().parents[2] / "models" / "stories-1m"
    tokenizer = Tokenizer.from_folder(folder)
    caps = simulated_caps(
        groups=[("full", 0, 32, 8192)],
        vocab_size=tokenizer.vocab_size,
        max_context=8192,
        max_rows=64,
        max_tokens=8192,
    )
    token_id = tokenizer.encode(" word")[-1]
    config = ServerConfig(port=0)
    llm = LLM(NullExecutor(caps, token_id), tokenizer, simulated_spec(caps), RuntimeConfig())
    state = make_state(config, [("null", LocalChannel(llm), tokenizer)])
    server = Server(state, listen(config), lambda: print(server.port, flush=True))
    server.run()


async def stream(port: int, body: bytes) -> tuple[list[float], int]:
    """(arrival times of reads that held events, number of events) of one streamed request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}")
    writer.write("\r\n".join((*lines, "", "")).encode() + body)
    times: list[float] = []
    events = 0
    tail = b""
    while part := await reader.read(65536):
        found = (tail[-5:] + part).count(b"data: {") - tail[-5:].count(b"data: {")
        tail = part
        if found:
            events += found
            times.append(time.perf_counter())
    writer.close()
    return times, events


async def measure(port: int, num_clients: int, num_tokens: int) -> dict[str, object]:
    """All clients at once, `num_tokens` each, counted by the usage the server reports."""
    body = json.dumps(
        {
            "prompt": "Once upon a time",
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    started = time.perf_counter()
    results = await asyncio.gather(*(stream(port, body) for _ in range(num_clients)))
    wall_s = time.perf_counter() - started
    events = [count for _, count in results]
    assert all(count == num_tokens + 1 for count in events), f"events were lost: {sorted(set(events))}"
    gaps = [later - earlier for times, _ in results for earlier, later in itertools.pairwise(times)]
    return {
        "num_clients": num_clients,
        "tokens": num_clients * num_tokens,
        "wall_s": wall_s,
        "tokens_per_s": num_clients * num_tokens / wall_s,
        "ttft_s": percentiles([times[0] - started for times, _ in results]),
        "gap_s": percentiles(gaps),
        "reads_per_client": percentiles([float(len(times)) for times, _ in results]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    record = Record("sse_throughput")
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        asyncio.run(measure(port, 4, 50))
        runs = [
            asyncio.run(measure(port, arguments.clients, arguments.tokens)) for _ in range(arguments.runs)
        ]
    finally:
        process.terminate()
        process.wait(30)
    ordered = sorted(runs, key=lambda run: float(str(run["tokens_per_s"])))
    median = ordered[len(ordered) // 2]
    results = {"bar_tokens_per_s": BAR_TOKENS_PER_S, "median": median, "runs": runs}
    path = record.write(results)
    print(json.dumps(median, indent=2))
    print(path)


if __name__ == "__main__":
    main()
