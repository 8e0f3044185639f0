"""A simulated engine in a process of its own, for tests of the channel: `python engine_child.py [MODE] FD`.
MODE `broken` ends before it says anything, and `once=FILE` does when it is started again; `fatal` ends at a
prompt that begins with token 25 (z) and stands still at one that begins with token 24 (y); in `device` the
device is lost in a step with the former."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.cuda_driver import lost_device
from llmc.runtime.executors.simulated import simulated_caps, simulated_spec
from llmc.runtime.llm import LLM
from llmc.runtime.server.engine_process import host_engine


def parts(folder):
    """The means that the tests of a folder share."""
    spec = importlib.util.spec_from_file_location("parts", folder / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    mode = sys.argv[1] if len(sys.argv) > 2 else ""
    mark = Path(mode.removeprefix("once=")) if mode.startswith("once=") else None
    if mode == "broken" or (mark is not None and mark.exists()):
        sys.exit(7)
    if mark is not None:
        mark.touch()
    folder = Path(__file__).parent
    executor = parts(folder).SlowExecutor(simulated_caps(max_in_flight=2))
    apply = executor.apply

    def watched(diff):
        if mode == "fatal" and any(entry.token_ids[0] == 25 for entry in diff.enter):
            time.sleep(0.02)
            os.abort()
        if mode == "fatal" and any(entry.token_ids[0] == 24 for entry in diff.enter):
            time.sleep(60)
        entered.update(entry.token_ids[0] for entry in diff.enter)
        apply(diff)

    collect, entered = executor.collect, set()

    def failing(ticket):
        """As of a device whose context a kernel broke: no step's results come any more."""
        if mode == "device" and 25 in entered:
            raise lost_device("cuEventSynchronize failed: an illegal memory access was encountered.")
        return collect(ticket)

    executor.apply, executor.collect = watched, failing
    executor.delay_s = 0.002
    llm = LLM(
        executor, parts(folder.parent).make_letters(), simulated_spec(executor.caps, (28,)), RuntimeConfig()
    )
    with socket.socket(fileno=int(sys.argv[-1])) as connection, llm:
        asyncio.run(host_engine(llm, connection, {"load": 0.0}))


main()
