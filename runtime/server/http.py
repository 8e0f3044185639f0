"""What is answered before a request reaches a route: input that is no HTTP, and connections beyond the bound,
in the shape of every other error."""

from __future__ import annotations

import sys
from collections.abc import Callable

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ServingError, error_response
from .state import ServerState

_TOO_LARGE = 431


class Protocol(H11Protocol):
    """uvicorn's protocol, with this server's errors."""

    def send_400_response(self, msg: str) -> None:
        """Answers what h11 could not read, and hangs up: 431 where headers are too long, else 400. Where an
        answer has begun, there is no room for another."""
        error = sys.exception()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        response = error_response(_unreadable(hint, str(error or msg)))
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=response.status_code, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class BoundedConnections:
    """`app` for as many connections as the settings allow, a 503 with advice for those beyond. `count` tells
    how many are open, the one that asks included."""

    def __init__(self, app: ASGIApp, state: ServerState, count: Callable[[], int]) -> None:
        self._app = app
        self._state = state
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most, now = self._state.config.max_connections, self._count()
        if now <= most:
            await self._app(scope, receive, send)
            return
        refusal = ServingError(
            503,
            "server.connections",
            f"The server has {now} connections.",
            f"It takes {most} at a time.",
            "Try again after the time in Retry-After, or close connections that are not used.",
            retry_after_s=max(
                model.backlog.retry_after_s(1, model.backlog.num_sequences)
                for model in self._state.models.values()
            ),
        )
        response = error_response(refusal)
        response.headers["connection"] = "close"
        await response(scope, receive, send)


def _unreadable(status: int, why: str) -> ServingError:
    if status == _TOO_LARGE:
        return ServingError(
            _TOO_LARGE,
            "http.headers_too_large",
            "The request line and headers are too long.",
            f"{why.rstrip('.')}.",
            "Send fewer or shorter headers.",
        )
    return ServingError(
        400,
        "http.malformed",
        "What was sent is no HTTP request.",
        f"{why.rstrip('.')}.",
        "Send HTTP/1.1; for https give the server a certificate.",
    )
