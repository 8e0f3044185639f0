"""Reading a request's body within bounds of size and time, and noticing that its sender has gone."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from .client import ClientGone
from .config import ServerConfig
from .errors import ServingError

_DISCARD_FACTOR = 16


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The body. 413 beyond `max_body_bytes`, 415 for what does not say it is JSON, 408 when it comes too
    slowly; ClientGone when the rest will not come."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise ServingError(
            415,
            "request.content_type",
            f"The body is {content_type[:100]!r}.",
            "This route reads JSON.",
            "Send the header Content-Type: application/json.",
        )
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(request, config.max_body_bytes)
    except TimeoutError as error:
        raise ServingError(
            408,
            "request.slow_body",
            f"The body was not there after {config.body_timeout_s:g} s.",
            "A connection is not kept for a sender that slow.",
            "Send the request again.",
        ) from error
    except ClientDisconnect as error:
        raise ClientGone from error


async def _read(request: Request, max_bytes: int) -> bytes:
    """Reads on beyond the bound for a while, keeping nothing: a client that still sends would not see why it
    was refused."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
        else:
            parts.clear()
        if size > max_bytes * _DISCARD_FACTOR:
            break
    if size > max_bytes:
        raise ServingError(
            413,
            "request.body_too_large",
            f"The body has {'more than ' if size > max_bytes * _DISCARD_FACTOR else ''}{size} bytes.",
            f"This server reads at most {max_bytes}.",
            "Send a smaller request.",
        )
    return b"".join(parts)


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
