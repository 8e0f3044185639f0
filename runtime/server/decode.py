"""Bytes of a body to a checked request struct. Whatever is wrong is a 400 that names the place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec

from .errors import ServingError, bad_request
from .fields import Field, select_fields

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_MAX_DEPTH = 64


def decode_body(body: bytes, kind: type[T], table: Mapping[str, Field]) -> T:
    """The request in `body`. A 400 for what is no JSON object, for unknown and unsupported fields, and for
    values of the wrong type or out of range."""
    given = _parse(body)
    fields = select_fields(given, table)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error


def _parse(body: bytes) -> dict[str, Any]:
    try:
        _check_depth(body)
        given: object = msgspec.json.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(
            "request.malformed_json",
            "The body is not valid JSON.",
            f"{str(error).rstrip('.')}.",
            "Send one JSON object in UTF-8.",
        ) from error
    if not isinstance(given, dict):
        raise bad_request(
            "request.not_an_object",
            "The body is not a JSON object.",
            "The fields of a request have names.",
            'Send an object such as {"model": …}.',
        )
    return cast("dict[str, Any]", given)


def _check_depth(body: bytes) -> None:
    """Refuses absurd nesting before a recursive parser meets it: no honoured field needs any."""
    if body.count(b"[") + body.count(b"{") <= _MAX_DEPTH:
        return
    depth = 0
    for bracket in re.findall(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', body, re.DOTALL):
        if bracket in (b"[", b"{"):
            depth += 1
            if depth > _MAX_DEPTH:
                raise bad_request(
                    "request.nesting",
                    f"The body is nested more than {_MAX_DEPTH} levels deep.",
                    "No request needs that.",
                    "Send a flatter object.",
                )
        elif bracket in (b"]", b"}"):
            depth -= 1


def _invalid(message: str) -> ServingError:
    """msgspec's sentence, and the field it is about."""
    found = _PLACE.search(message)
    place = found.group(1) if found is not None else ""
    reason = message[: found.start()] if found is not None else message
    missing = re.search(r"missing required field `(\w+)`", reason)
    param = missing.group(1) if missing is not None else re.split(r"[.\[]", place)[0] or None
    code = "request.missing_field" if missing is not None else "request.invalid_field"
    return bad_request(
        code,
        f"The field {place or param or 'of the body'} is not acceptable."
        if missing is None
        else f"The field {param} is missing.",
        f"{reason.rstrip('.')}.",
        "Send a value of that type and range." if missing is None else "Send it.",
        param,
    )
