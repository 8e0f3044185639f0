"""The thread that owns an engine: takes commands, steps while there is work, hands outputs to sessions, and
answers from the response cache what is known there. Knows no prompts and no parameters."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..spec.errors import InternalError, LlmcError, RequestError
from .engine import Engine
from .outputs import StreamChunk
from .request import FinishReason
from .response_cache import Recorder, ReplayChunk, ResponseCache
from .session import Session

Command = Callable[[], None]


@dataclass(slots=True)
class _Making:
    """A response that is being made and written down, and who else asked for it meanwhile."""

    recorder: Recorder
    followers: list[Session] = field(default_factory=list[Session])


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
        self._making: dict[bytes, _Making] = {}
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
        self._let_go(session)

    def _forget(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is None or session.open_ids:
            return
        self._by_name.pop(session.request_id, None)
        if self._responses is not None and session.recorder is not None:
            self._responses.keep(session.recorder)
        self._let_go(session)

    def _let_go(self, session: Session) -> None:
        """It writes nothing down any more. Followers who have not got all of it go on by themselves."""
        if session.recorder is None:
            return
        making = self._making.pop(session.recorder.key)
        session.recorder = session.relay = None
        for follower in making.followers:
            self._by_name.pop(follower.request_id, None)
            if follower.open_ids and self._is_closed:
                follower.abandon()
            elif follower.open_ids:
                follower.start_over()
                self._add(follower)

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
            if self._follow(session) or self._replay(session):
                return
            for request in session.requests:
                if request.request_id in session.open_ids:
                    self._engine.add_request(request)
                    added.append(request.request_id)
        except LlmcError as error:
            for number in added:
                self._engine.abort(number)
            session.fail(error)
            self._let_go(session)
            return
        self._by_name[session.request_id] = session
        self._sessions.update(dict.fromkeys(added, session))

    def _follow(self, session: Session) -> bool:
        """Lets a session hear the response that is being made to the same request. A deadline would be the
        engine's to watch, so who has one asks for himself."""
        if self._responses is None or session.response_key is None or session.has_deadline:
            return False
        making = self._making.get(session.response_key)
        chunks = self._responses.join(making.recorder) if making is not None else None
        if making is None or chunks is None:
            return False
        making.followers.append(session)
        self._by_name[session.request_id] = session
        session.replay(chunks)
        return True

    def _relay(self, making: _Making, chunk: StreamChunk) -> None:
        news = [ReplayChunk.of(chunk)]
        for follower in tuple(making.followers):
            try:
                follower.replay(news)
            except Exception as error:  # noqa: BLE001 - a caller that breaks must not end who is followed
                making.followers.remove(follower)
                self._by_name.pop(follower.request_id, None)
                follower.fail(error)

    def _replay(self, session: Session) -> bool:
        """Answers with the response that the same request had before. False where none is known: then it is
        written down while it is made, if it may be kept."""
        if self._responses is None or session.response_key is None:
            return False
        chunks = self._responses.get(session.response_key)
        if chunks is None:
            # Who has followed may know some completions to their end already, and makes only the others.
            is_whole = len(session.open_ids) == len(session.requests)
            if is_whole and session.response_key not in self._making:
                session.recorder = self._responses.recorder(session.response_key)
                making = self._making[session.response_key] = _Making(session.recorder)
                session.relay = partial(self._relay, making)
            return False
        session.replay(chunks)
        return True

    def _abort(self, request_id: str) -> None:
        session = self._by_name.get(request_id)
        if session is None:
            return
        for making in self._making.values():
            if session in making.followers:
                making.followers.remove(session)
                del self._by_name[request_id]
                session.abandon()
                return
        for number in session.open_ids:
            self._engine.abort(number)

    def _fail(self, error: Exception) -> None:
        """The engine can no longer be trusted: every caller is told, and none is served from now on."""
        self._failure = error
        living = (*self._sessions.values(), *self._by_name.values())
        for session in {id(each): each for each in living}.values():
            session.fail(error)
        self._sessions.clear()
        self._by_name.clear()
        self._making.clear()

    def _shut_down(self) -> None:
        self._engine.close()
        if self._failure is None:
            while self._engine.has_work():
                self._step()
