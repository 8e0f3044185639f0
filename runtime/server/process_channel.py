"""An engine in a child process, as the server sees it. When the child dies its requests end with an error
and it is started again from the artifact. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from ...spec import errors
from ...spec.errors import LlmcError, TargetError
from ..config import RuntimeConfig
from .channel import Deliver
from .messages import (
    Abort,
    Command,
    EngineFacts,
    EngineSnapshot,
    Event,
    Failed,
    Generate,
    News,
    NotReady,
    Ready,
)
from .wire import frame, read_frame, receive_frame

_RESTART_WINDOW_S = 600.0
# Between a start that failed and the next: a device may need a moment after a fault. Doubles each time.
_RETRY_S = 1.0
_END_S = 10.0
_STILL = EngineSnapshot(
    num_running=0,
    num_waiting=0,
    kv_usage=0.0,
    num_steps=0,
    num_failed_steps=0,
    num_preemptions=0,
    num_computed_tokens=0,
)


def engine_command(artifact: Path, config: RuntimeConfig) -> tuple[str, ...]:
    """The command of a child that loads `artifact`; the number of its socket comes behind."""
    settings = msgspec.json.encode(config).decode()
    package = __package__ or ""
    return (sys.executable, "-m", f"{package}.engine_process", str(artifact), settings)


class _Child:
    """A started process and the socket to it. It is a session of its own: Ctrl-C is for the parent, which
    drains first; when the parent goes, the socket closes and the child ends."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, ready: Ready) -> None:
        self.process = process
        self.connection = connection
        self.ready = ready

    @classmethod
    def start(cls, command: Sequence[str]) -> Self:
        """Starts it and waits until it is ready. Its own error when it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        first = receive_frame(ours, msgspec.msgpack.Decoder(Ready | NotReady))
        if isinstance(first, Ready):
            return cls(process, ours, first)
        ours.close()
        status = process.wait()
        raise _start_error(first, status)

    def end(self, patience_s: float = _END_S) -> None:
        """Closes the socket and waits; kills it when it does not end by itself."""
        self.connection.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ProcessChannel:
    """Commands to a child, events from it. Starts the child when it is made: errors are those of loading.

    More than `max_restarts` deaths, or starts that failed, within ten minutes are a failure for good.
    """

    def __init__(
        self, command: Sequence[str], *, max_restarts: int = 3, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._command = tuple(command)
        self._max_restarts = max_restarts
        self._clock = clock
        self._child = _Child.start(command)
        self._deaths: deque[float] = deque()
        self._open: dict[str, int] = {}
        self._snapshot = _STILL
        self._num_restarts = 0
        self._last_death: str | None = None
        self._is_starting = False
        self._failure: str | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._early: list[bytes] = []
        self._deliver: Deliver | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = logging.getLogger("llmc.server")

    @property
    def facts(self) -> EngineFacts:
        return self._child.ready.facts

    @property
    def pid(self) -> int:
        """The child's process number."""
        return self._child.process.pid

    def connect(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, command: Command) -> None:
        if isinstance(command, Abort) and command.request_id not in self._open:
            return
        if self._is_starting or self._failure is not None:
            event = _lost(command.request_id, self._failure)
            asyncio.get_running_loop().call_soon(self._tell, (event,))
            return
        if isinstance(command, Generate):
            self._open[command.request_id] = command.params.n
        data = frame(command)
        if self._writer is None:
            self._early.append(data)
        else:
            self._writer.write(data)

    def snapshot(self) -> EngineSnapshot:
        return msgspec.structs.replace(
            self._snapshot,
            failure=self._failure,
            is_starting=self._is_starting,
            num_restarts=self._num_restarts,
            last_death=self._last_death,
        )

    def recover(self) -> bool:
        """The child is killed, and what follows is what follows any death of it."""
        if self._is_starting or self._failure is not None:
            return False
        self._child.process.kill()
        return True

    def close(self) -> None:
        self._child.end()

    async def _run(self) -> None:
        """Listens to one child after the other."""
        while True:
            await self._listen()
            self._is_starting = True
            self._mourn()
            await self._start_again()
            if self._failure is not None:
                return

    async def _start_again(self) -> None:
        """Until there is a child, or there is to be none."""
        pause_s = _RETRY_S
        while self._failure is None:
            try:
                self._child = await asyncio.to_thread(_Child.start, self._command)
                break
            except LlmcError as error:
                self._count_death(f"it could not be started again: {error}")
            if self._failure is None:
                await asyncio.sleep(pause_s)
                pause_s *= 2
        self._is_starting = False

    async def _listen(self) -> None:
        """Until the child has gone."""
        reader, writer = await asyncio.open_connection(sock=self._child.connection)
        for data in self._early:
            writer.write(data)
        self._early.clear()
        self._writer = writer
        news = msgspec.msgpack.Decoder(News)
        try:
            while (told := await read_frame(reader, news)) is not None:
                self._snapshot = told.snapshot
                self._tell(told.events)
        finally:
            self._writer = None
            with contextlib.suppress(OSError):
                writer.close()

    def _mourn(self) -> None:
        """The child is dead: its requests end, and whether it may live again is decided."""
        self._child.end(patience_s=0.5)
        told = self._snapshot.failure
        self._snapshot = _STILL
        self._num_restarts += 1
        status = self._child.process.returncode
        self._count_death(f"its process ended with status {status}" + (f" after {told}" if told else ""))
        self._log.error("%d requests are lost", len(self._open))
        self._tell([_lost(name, self._failure) for name in self._open])

    def _count_death(self, why: str) -> None:
        """Whether it may live again is decided."""
        self._last_death = why = why.rstrip(".")
        now_s = self._clock()
        self._deaths.append(now_s)
        while now_s - self._deaths[0] > _RESTART_WINDOW_S:
            self._deaths.popleft()
        self._log.error("an engine in a process of its own: %s", why)
        if len(self._deaths) > self._max_restarts:
            self._failure = f"It died {len(self._deaths)} times in ten minutes, the last time because {why}."

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                self._open.pop(event.request_id, None)
            elif event.chunk.finish_reason is not None and event.request_id in self._open:
                self._open[event.request_id] -= 1
                if not self._open[event.request_id]:
                    del self._open[event.request_id]
        if self._deliver is not None and events:
            self._deliver(events)


def _lost(request_id: str, failure: str | None) -> Failed:
    return Failed(
        request_id=request_id,
        status=503 if failure is None else 500,
        code="engine.died" if failure is None else "engine.failed",
        what="The engine's process has died.",
        why="It is being started again." if failure is None else failure,
        fix="Send the request again." if failure is None else "Look into the server's log, and restart it.",
    )


def _start_error(first: NotReady | None, status: int) -> LlmcError:
    """The child's own error as an exception of its class."""
    if first is None:
        return TargetError(
            "engine.no_start",
            "The engine's process could not start.",
            f"It ended with status {status} before it said anything.",
            "Look at what it wrote to stderr.",
        )
    kind = getattr(errors, first.kind, errors.InternalError)
    return kind(first.code, first.what, first.why, first.fix)
