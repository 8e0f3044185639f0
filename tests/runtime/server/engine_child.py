"""A simulated engine in a process of its own, for tests of the channel: `python engine_child.py [MODE] FD`.
MODE `broken` ends before it says anything, `fatal` ends at a prompt that begins with token 25 (z) and stands
still at one that begins with token 24 (y)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import simulated_caps
from llmc.runtime.llm import LLM
from llmc.runtime.server.engine_process import host_engine


def parts():
    spec = importlib.util.spec_from_file_location("server_parts", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    mode = sys.argv[1] if len(sys.argv) > 2 else ""
    if mode == "broken":
        sys.exit(7)
    made = parts()
    executor = made.SlowExecutor(simulated_caps(max_in_flight=2))
    apply = executor.apply

    def watched(diff):
        if mode == "fatal" and any(entry.token_ids[0] == 25 for entry in diff.enter):
            time.sleep(0.02)
            os.abort()
        if mode == "fatal" and any(entry.token_ids[0] == 24 for entry in diff.enter):
            time.sleep(60)
        apply(diff)

    executor.apply = watched
    executor.delay_s = 0.002
    llm = LLM(executor, made.letters(), made.SPEC, RuntimeConfig())
    with socket.socket(fileno=int(sys.argv[-1])) as connection, llm:
        asyncio.run(host_engine(llm, connection, {"load": 0.0}))


main()
