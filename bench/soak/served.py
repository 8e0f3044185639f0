"""The server under soak, a process of its own: prints a line of JSON when it is ready, and one with the state
of its books when it has ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps, simulated_spec
from llmc.runtime.llm import LLM
from llmc.runtime.load import load
from llmc.runtime.server.channel import LocalChannel
from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.process import Server, listen
from llmc.runtime.server.state import make_state
from llmc.runtime.tokenizer import Tokenizer

CONFIG = RuntimeConfig(
    max_requests=12, max_step_tokens=64, speculation="ngram", ngram_min=1, response_cache_bytes=1 << 18
)


def simulated() -> LLM:
    """Few pages and two kinds of cache, so that requests are preempted and prefixes evicted all the time."""
    tokenizer = Tokenizer.from_folder(Path(__file__).resolve().parents[2] / "models" / "stories-1m")
    caps = simulated_caps(
        groups=(("full", 0, 8, 44), ("window", 24, 8, 40)),
        vocab_size=tokenizer.vocab_size,
        max_context=256,
        max_rows=12,
        max_in_flight=2,
    )
    return LLM(SimulatedExecutor(caps), tokenizer, simulated_spec(caps), CONFIG)


def main() -> None:
    llm = load(sys.argv[1], CONFIG) if len(sys.argv) > 1 else simulated()
    config = ServerConfig(port=0, max_waiting=12)
    state = make_state(config, [("soaked", LocalChannel(llm), llm.tokenizer)])
    ready = {"vocab_size": llm.limits.vocab_size, "context": llm.limits.max_model_len}
    server = Server(
        state, listen(config), lambda: print(json.dumps({"port": server.port, **ready}), flush=True)
    )
    server.run()
    books = llm.engine.blocks
    books.check()
    print(
        json.dumps(
            {
                "pages_held": sum(books.used()),
                "requests_open": state.num_open + llm.engine.num_running + llm.engine.num_waiting,
                "places_taken": state.models["soaked"].backlog.num_sequences,
                "steps": llm.engine.stats.num_steps,
                "failed_steps": llm.engine.stats.num_failed_steps,
                "preemptions": llm.engine.stats.num_preemptions,
                "drafted": sum(llm.engine.stats.drafted_at),
                "response_hits": llm.engine.stats.responses.num_hits,
                "response_evictions": llm.engine.stats.responses.num_evictions,
                "finished": {reason.value: count for reason, count in llm.engine.stats.finished.items()},
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
