"""What a failure looks like over HTTP: OpenAI's error object, with a code and sentences. Knows no route."""

from __future__ import annotations

import dataclasses
import math

import msgspec
from starlette.responses import Response

from ...spec.errors import LlmcError
from ..params import SamplingParams
from .messages import Failed

# A code `request.X` is about the field X where there is one of that name.
_FIELDS = frozenset(each.name for each in dataclasses.fields(SamplingParams))
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`message` says what, why and what to do; `code` is stable; `param` is the request field, if one is to
    blame."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ServingError(LlmcError):
    """Something that only a server can refuse: too much load, a bad key, an unknown model.

    `status` is the HTTP status; `retry_after_s` tells the client when to come back; `param` is the request
    field to blame.
    """

    def __init__(
        self,
        status: int,
        code: str,
        what: str,
        why: str,
        fix: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(code, what, why, fix)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s


def bad_request(code: str, what: str, why: str, fix: str, param: str | None = None) -> ServingError:
    """A 400."""
    return ServingError(400, code, what, why, fix, param=param)


def from_event(event: Failed) -> ServingError:
    """The engine's refusal. A full queue is the server's load, not the caller's mistake."""
    overloaded = event.code == "request.queue_full"
    passes = overloaded or event.status == 503
    return ServingError(
        503 if passes else event.status,
        event.code,
        event.what,
        event.why,
        event.fix,
        retry_after_s=1.0 if passes else None,
    )


def status_of(error: LlmcError) -> int:
    return error.status if isinstance(error, ServingError) else error.http_status


def error_body(error: LlmcError) -> ErrorBody:
    """The JSON that tells `error`."""
    status = status_of(error)
    param = error.param if isinstance(error, ServingError) else None
    room, _, subject = error.code.partition(".")
    if param is None and room == "request" and subject in _FIELDS:
        param = subject
    return ErrorBody(
        ErrorDetail(
            message=str(error),
            type=_TYPES.get(status, "server_error"),
            param=param,
            code=error.code,
        )
    )


def error_response(error: LlmcError) -> Response:
    """The whole answer, with `Retry-After` in whole seconds where the error has one."""
    headers: dict[str, str] = {}
    if isinstance(error, ServingError):
        if error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(error_body(error)), status_of(error), headers, media_type="application/json"
    )
