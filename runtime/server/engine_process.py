"""The child's side of an engine in a process of its own: loads an artifact, then takes commands from a socket
and sends events. Knows no HTTP. Started as `python -m llmc.runtime.server.engine_process`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence

import msgspec

from ...spec.errors import DeviceLostError, InternalError, LlmcError
from ..config import RuntimeConfig
from ..llm import LLM
from ..load import StartLedger, load
from .channel import LocalChannel
from .messages import Command, EngineSnapshot, Event, News, NotReady, Ready
from .wire import frame, read_frame

_REPORT_S = 0.25
# What is left to a broken engine for telling its callers.
_LAST_WORDS_S = 0.05
# The exit codes of a process whose device, or whose engine, failed; nothing of it can be shut down in order.
DEVICE_LOST, ENGINE_BROKEN = 5, 6


def main(arguments: Sequence[str]) -> int:
    """ARTIFACT, runtime settings as JSON, number of the inherited socket. The exit code."""
    path, settings, number = arguments
    with socket.socket(fileno=int(number)) as connection:
        ledger = StartLedger()
        try:
            llm = load(path, msgspec.json.decode(settings, type=RuntimeConfig), ledger=ledger)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must be told
            connection.sendall(frame(_not_ready(error)))
            return 1
        with llm:
            asyncio.run(host_engine(llm, connection, ledger.steps))
    return 0


async def host_engine(llm: LLM, connection: socket.socket, seconds: dict[str, float]) -> None:
    """Serves `llm` to the other end of `connection` until that closes. Whatever still runs is aborted."""
    channel = LocalChannel(llm)
    reader, writer = await asyncio.open_connection(sock=connection)
    last: list[EngineSnapshot] = []

    def tell(events: Sequence[Event]) -> None:
        snapshot = channel.snapshot()
        last[:] = [snapshot]
        writer.write(frame(News(tuple(events), snapshot)))

    async def report() -> None:
        """Keeps the parent's picture true while nothing is said."""
        while True:
            await asyncio.sleep(_REPORT_S)
            if llm.failure is not None:
                await asyncio.sleep(_LAST_WORDS_S)
                tell(())
                with contextlib.suppress(OSError, TimeoutError):
                    await asyncio.wait_for(writer.drain(), 1.0)
                # The parent sees the process die, and starts another from the artifact.
                os._exit(DEVICE_LOST if isinstance(llm.failure, DeviceLostError) else ENGINE_BROKEN)
            if [channel.snapshot()] != last:
                tell(())

    writer.write(frame(Ready(channel.facts, seconds)))
    channel.connect(tell)
    reporter = asyncio.create_task(report())
    commands = msgspec.msgpack.Decoder(Command)
    try:
        while (command := await read_frame(reader, commands)) is not None:
            channel.send(command)
    finally:
        reporter.cancel()
        channel.close()
        with contextlib.suppress(OSError):
            writer.close()


def _not_ready(error: Exception) -> NotReady:
    if not isinstance(error, LlmcError):
        error = InternalError(
            "engine.no_start",
            "The engine could not start.",
            f"{type(error).__name__}: {error}.",
            "Load the artifact with `llmc generate --debug` to see more.",
        )
    kind = type(error).__name__
    return NotReady(kind=kind, code=error.code, what=error.what, why=error.why, fix=error.fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
