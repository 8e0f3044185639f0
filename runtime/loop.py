"""The thread that owns an engine: takes commands, steps while there is work, hands outputs to sessions, and
answers from the response cache what is known there. Knows no prompts and no parameters."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable

from ..spec.errors import InternalError, LlmcError, RequestError
from .engine import Engine
from .request import FinishReason
from .response_cache import ResponseCache
from .session import Session

Command = Callable[[], None]


class EngineLoop:
    """Runs an engine in one thread, which starts with the first command and ends with `close`.

    Everything public may be called from any thread.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        max_bytes = engine.config.response_cache_bytes
        self._responses = ResponseCache(max_bytes, engine.stats.responses) if max_bytes else None
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._sessions: dict[int, Session] = {}
        self._by_name: dict[str, Session] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._failure: Exception | None = None

    @property
    def failure(self) -> Exception | None:
        """What broke the engine; every request is refused with it from then on."""
        return self._failure

    def submit(self, session: Session) -> None:
        """Queues all requests of a session. What the engine refuses goes to the session's sink."""
        self._send(lambda: self._add(session))

    def abort(self, request_id: str) -> None:
        """Ends a session's requests. A session that has ended already, or never was, changes nothing."""
        self._send(lambda: self._abort(request_id))

    def close(self) -> None:
        """Aborts all requests, closes engine and executor, waits for the thread. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            thread = self._thread
        atexit.unregister(self.close)
        if thread is None:
            self._engine.close()
            return
        self._commands.put(None)
        thread.join()

    def _send(self, command: Command) -> None:
        with self._lock:
            if self._is_closed:
                raise InternalError(
                    "runtime.closed",
                    "The model is closed.",
                    "A request was made after close().",
                    "Load the artifact again.",
                )
            if self._thread is None:
                atexit.register(self.close)  # native code must not run while the interpreter goes down
                self._thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)
                self._thread.start()
            self._commands.put(command)

    def _run(self) -> None:
        while self._take_commands():
            if self._engine.has_work() and self._failure is None:
                try:
                    self._step()
                except Exception as error:  # noqa: BLE001 - a thread must not die without telling its callers
                    self._fail(error)
        self._shut_down()

    def _take_commands(self) -> bool:
        """Runs what was asked for, waiting when there is nothing else to do. False to end."""
        busy = self._engine.has_work() and self._failure is None
        while True:
            try:
                command = self._commands.get(block=not busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            busy = True

    def _step(self) -> None:
        for output in self._engine.step():
            session = self._sessions.get(output.request_id)
            if session is None:
                continue
            try:
                is_over = session.take(output)
            except Exception as error:  # noqa: BLE001 - what breaks over one text must not end the others
                self._drop(session, error)
                continue
            if is_over:
                self._engine.abort(output.request_id, FinishReason.STOP)
            if output.finished is not None:
                self._forget(output.request_id)

    def _drop(self, session: Session, error: Exception) -> None:
        for request in session.requests:
            self._engine.abort(request.request_id, FinishReason.ERROR)
            self._sessions.pop(request.request_id, None)
        self._by_name.pop(session.request_id, None)
        session.fail(error)

    def _forget(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is None or session.open_ids:
            return
        self._by_name.pop(session.request_id, None)
        if self._responses is not None and session.recorder is not None:
            self._responses.keep(session.recorder)
            session.recorder = None

    def _add(self, session: Session) -> None:
        if self._failure is not None:
            session.fail(self._failure)
            return
        added: list[int] = []
        try:
            if session.request_id in self._by_name:
                raise RequestError(
                    "request.duplicate",
                    f"A request called {session.request_id!r} is running.",
                    "Names must be unique while a request lives.",
                    "Choose another request_id, or leave it out.",
                )
            if self._replay(session):
                return
            for request in session.requests:
                self._engine.add_request(request)
                added.append(request.request_id)
        except LlmcError as error:
            for number in added:
                self._engine.abort(number)
            session.fail(error)
            return
        self._by_name[session.request_id] = session
        self._sessions.update(dict.fromkeys(added, session))

    def _replay(self, session: Session) -> bool:
        """Answers with the response that the same request had before. False where none is known: then it is
        written down while it is made, if it may be kept."""
        if self._responses is None or session.response_key is None:
            return False
        chunks = self._responses.get(session.response_key)
        if chunks is None:
            session.recorder = self._responses.recorder(session.response_key)
            return False
        session.replay(chunks)
        return True

    def _abort(self, request_id: str) -> None:
        session = self._by_name.get(request_id)
        for number in session.open_ids if session is not None else ():
            self._engine.abort(number)

    def _fail(self, error: Exception) -> None:
        """The engine can no longer be trusted: every caller is told, and none is served from now on."""
        self._failure = error
        for session in {id(each): each for each in self._sessions.values()}.values():
            session.fail(error)
        self._sessions.clear()
        self._by_name.clear()

    def _shut_down(self) -> None:
        self._engine.close()
        if self._failure is None:
            while self._engine.has_work():
                self._step()
