"""The way to an engine: commands go in, events come out on the event loop. Knows no HTTP. Events of one step
wake the loop once, whatever their number."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ...spec.errors import InternalError, LlmcError
from ..grammar import Grammar
from ..llm import LLM
from ..outputs import StreamChunk
from ..structured import StructuredOutput
from .messages import Abort, Command, EngineFacts, EngineSnapshot, Event, Failed, Generate, Said

_NUM_COMPILERS = 2
Deliver = Callable[[Sequence[Event]], None]


class EngineChannel(Protocol):
    """What the server needs of an engine, wherever it runs."""

    @property
    def facts(self) -> EngineFacts: ...

    def connect(self, deliver: Deliver) -> None:
        """Events go to `deliver`, in the running event loop, from now on."""
        ...

    def send(self, command: Command) -> None:
        """Never raises for a request that cannot be served: that is a `Failed`."""
        ...

    def snapshot(self) -> EngineSnapshot: ...

    def recover(self) -> bool:
        """Ends an engine that is stuck and starts it again: its requests end with an error. False where only
        the whole server can be."""
        ...

    def close(self) -> None:
        """Ends all requests and the engine. Waits for it."""
        ...


class LocalChannel:
    """An engine in a thread of this process. Requests with a form are compiled in threads beside the event
    loop before they are queued."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._events: deque[Event] = deque()
        self._is_waking = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Deliver | None = None
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, "llmc-grammar")
        self._compiling_lock = threading.Lock()
        self._compiling: set[str] = set()
        caps = llm.engine.blocks
        self._facts = EngineFacts(
            executor=llm.executor_name,
            limits=llm.limits,
            defaults=llm.default_params(),
            eos_token_ids=llm.eos_token_ids,
            num_blocks=tuple(caps.available()),
            page_tokens=tuple(group.page_tokens for group in caps.groups),
            speculates=llm.engine.config.speculation != "none",
            details={name: str(value) for name, value in llm.executor_details.items()},
        )

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def connect(self, deliver: Deliver) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver

    def send(self, command: Command) -> None:
        if isinstance(command, Abort):
            self._abort(command.request_id)
        elif command.params.structured is None:
            self._generate(command)
        else:
            self._compiling.add(command.request_id)
            self._compilers.submit(
                self._compile, command, command.params.structured, self._llm.engine.now_s()
            )

    def snapshot(self) -> EngineSnapshot:
        engine = self._llm.engine
        stats = engine.stats
        shares = zip(engine.blocks.available(), self._facts.num_blocks, strict=True)
        failure = self._llm.failure
        return EngineSnapshot(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_preempted=engine.num_preempted,
            kv_usage=max((1.0 - free / total for free, total in shares if total), default=0.0),
            num_steps=stats.num_steps,
            num_failed_steps=stats.num_failed_steps,
            num_preemptions=stats.num_preemptions,
            num_computed_tokens=stats.num_computed_tokens,
            num_corrupted=stats.num_corrupted,
            drafted_at=tuple(stats.drafted_at),
            accepted_at=tuple(stats.accepted_at),
            num_response_hits=stats.responses.num_hits,
            num_response_misses=stats.responses.num_misses,
            response_bytes=stats.responses.num_bytes,
            failure=None if failure is None else f"{type(failure).__name__}: {failure}",
        )

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._llm.close()

    def _abort(self, request_id: str) -> None:
        """One that is being compiled ends here: the engine does not know it yet."""
        with self._compiling_lock:
            is_compiling = request_id in self._compiling
            self._compiling.discard(request_id)
        if is_compiling:
            self._say(_aborted(request_id))
        else:
            self._llm.abort(request_id)

    def _compile(self, command: Generate, wanted: StructuredOutput, arrival_s: float) -> None:
        """In a thread of its own: queues the request when its form is there, unless it was aborted."""
        grammar: Grammar | None = None
        refusal: Exception | None = None
        try:
            grammar = self._llm.compile_form(wanted)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request must have an ending
            refusal = error
        with self._compiling_lock:
            if command.request_id not in self._compiling:
                return
            self._compiling.discard(command.request_id)
            if refusal is None:
                self._generate(command, grammar, arrival_s)
        if refusal is not None:
            self._say(failed(command.request_id, refusal))

    def _generate(
        self, command: Generate, grammar: Grammar | None = None, arrival_s: float | None = None
    ) -> None:
        request_id = command.request_id

        def sink(told: StreamChunk | Exception) -> None:
            self._say(Said(told) if isinstance(told, StreamChunk) else failed(request_id, told))

        try:
            self._llm.submit(
                command.prompt_token_ids,
                command.params,
                sink,
                request_id,
                priority=command.priority,
                timeout_s=command.timeout_s,
                seed_is_drawn=command.seed_is_drawn,
                owner=command.owner,
                grammar=grammar,
                arrival_s=arrival_s,
            )
        except LlmcError as error:
            self._say(failed(request_id, error))

    def _say(self, event: Event) -> None:
        """From any thread. Appending comes before looking at the flag, and the
        flag is lowered before reading: no event is left behind."""
        self._events.append(event)
        loop = self._loop
        if loop is None or self._is_waking:
            return
        self._is_waking = True
        try:
            loop.call_soon_threadsafe(self._flush)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self._events.clear()

    def _flush(self) -> None:
        self._is_waking = False
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        if self._deliver is not None and events:
            self._deliver(events)


def _aborted(request_id: str) -> Failed:
    return Failed(
        request_id=request_id,
        status=503,
        code="server.aborted",
        what="The server ended the request.",
        why="It was not needed any more, or the server is shutting down.",
        fix="Send the request again.",
    )


def failed(request_id: str, error: Exception) -> Failed:
    """An exception as a message."""
    if not isinstance(error, LlmcError):
        error = InternalError(
            "engine.failed",
            "The engine failed.",
            f"{type(error).__name__}: {error}.",
            "Look into the server's log, and report this.",
        )
    return Failed(
        request_id=request_id,
        status=error.http_status,
        code=error.code,
        what=error.what,
        why=error.why,
        fix=error.fix,
    )
