"""Sending a generation: server-sent events while it grows, or one body when it is whole. Watches the client
meanwhile; closes the run whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...spec.errors import LlmcError
from .body import until_disconnect
from .client import ClientGone
from .run import Piece, Run
from .writer import Writer

_DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def frame(body: msgspec.Struct) -> bytes:
    """One server-sent event; bodies that know the name of their event say it."""
    name = getattr(body, "event_name", None)
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


async def reply_whole(run: Run, writer: Writer, request: Request) -> Response:
    """The answer in one body. ServingError when the generation ends badly."""
    try:
        return await _whole(run, writer, request)
    finally:
        run.close()


async def _whole(run: Run, writer: Writer, request: Request) -> Response:
    async with _watching(run, request.receive):
        pieces: list[Piece] = []
        while not run.is_over:
            pieces.extend(await run.take())
    return Response(msgspec.json.encode(writer.whole(pieces, run.usage())), media_type="application/json")


async def reply_stream(
    run: Run, writer: Writer, request: Request, *, with_usage: bool, send_timeout_s: float
) -> EventStream:
    """A stream whose first events are there: what fails before them still gets a status of its own.
    ServingError then."""
    try:
        async with _watching(run, request.receive):
            first = _frames(writer, await run.take())
    except BaseException:
        run.close()
        raise
    return EventStream(run, writer, first, with_usage, send_timeout_s)


class EventStream(Response):
    """Sends what has come since the last send in one piece, so that a slow reader gets fewer and larger ones;
    one that takes nothing for `send_timeout_s` is given up."""

    def __init__(
        self, run: Run, writer: Writer, first: bytes, with_usage: bool, send_timeout_s: float
    ) -> None:
        self._run = run
        self._writer = writer
        self._first = first
        self._with_usage = with_usage
        self._send_timeout_s = send_timeout_s
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientGone):
                async with _watching(self._run, receive):
                    await self._send(send)
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        """All of the stream. ClientGone where nobody reads on; the connection is closed then."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for part in self._parts():
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except TimeoutError as error:
                self._run.gave_up_reader()
                raise ClientGone from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _parts(self) -> AsyncIterator[bytes]:
        run = self._run
        yield self._first
        try:
            while not run.is_over:
                yield _frames(self._writer, await run.take())
        except LlmcError as error:
            yield frame(self._writer.failure(error))
            return
        if self._with_usage:
            yield frame(self._writer.usage_chunk(run.usage()))
        if self._writer.ends_with_done:
            yield _DONE


def _frames(writer: Writer, pieces: list[Piece]) -> bytes:
    return b"".join(map(frame, writer.chunks(pieces)))


@contextlib.asynccontextmanager
async def _watching(run: Run, receive: Receive) -> AsyncGenerator[None]:
    """Abandons the run when the client goes."""

    async def watch() -> None:
        await until_disconnect(receive)
        run.abandon()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
