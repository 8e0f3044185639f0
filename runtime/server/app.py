"""The ASGI application: routes, and every failure in the shape of an answer."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ...spec.errors import LlmcError
from .client import ClientGone
from .errors import ServingError, error_response
from .reply import CLIENT_CLOSED_REQUEST
from .routes import make_routes
from .state import ServerState

LOG = "llmc.server"


def make_app(state: ServerState) -> Starlette:
    """The application over `state`."""

    return Starlette(
        routes=make_routes(state),
        exception_handlers={
            LlmcError: _on_error,
            HTTPException: _on_http,
            ClientGone: _on_gone,
            Exception: _on_defect,
        },
    )


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LlmcError)
    return error_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]} is not a route of this server."
    why = "Its routes and their methods are in /openapi.json."
    response = error_response(
        ServingError(error.status_code, f"http.{error.status_code}", what, why, "Correct the address.")
    )
    response.headers.update(error.headers or {})
    return response


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_defect(request: Request, error: Exception) -> Response:
    logging.getLogger(LOG).error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(
        ServingError(
            500,
            "internal.unexpected",
            "The server failed.",
            f"{type(error).__name__} was not foreseen.",
            "Report this with the request and the server's log.",
        )
    )
