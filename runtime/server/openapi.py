"""The OpenAPI document, made from the request and response structs. Knows the routes' names, no state."""

from __future__ import annotations

from typing import Any

import msgspec

from ... import __version__
from .errors import ErrorBody
from .fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    EMBEDDING_FIELDS,
    RESPONSES_FIELDS,
    TOKENIZE_FIELDS,
    Field,
    Use,
)
from .requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from .responses import (
    ChatChunk,
    ChatResponse,
    CompletionResponse,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from .responses_writer import ResponseBody, ResponseEvent
from .status import Status

_TEMPLATE = "#/components/schemas/{name}"
_STRUCTS = (
    CompletionRequest,
    ChatRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ResponsesRequest,
    EmbeddingRequest,
    CompletionResponse,
    ChatResponse,
    ChatChunk,
    ResponseBody,
    ResponseEvent,
    TokenizeResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    HealthResponse,
    Status,
    ErrorBody,
)


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1 of every route but /metrics, whose body is not JSON, and this document itself."""
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_TEMPLATE)
    _add_neutral(components["CompletionRequest"], COMPLETION_FIELDS)
    _add_neutral(components["ChatRequest"], CHAT_FIELDS)
    _add_neutral(components["ResponsesRequest"], RESPONSES_FIELDS)
    _add_neutral(components["EmbeddingRequest"], EMBEDDING_FIELDS)
    _add_neutral(components["TokenizeRequest"], TOKENIZE_FIELDS)
    _add_neutral(components["DetokenizeRequest"], DETOKENIZE_FIELDS)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmc", "version": __version__},
        "paths": {
            "/v1/completions": _post(
                "Continue texts.", CompletionRequest, CompletionResponse, CompletionResponse
            ),
            "/v1/chat/completions": _post("Answer messages.", ChatRequest, ChatResponse, ChatChunk),
            "/v1/responses": _post("Answer items.", ResponsesRequest, ResponseBody, ResponseEvent),
            "/v1/embeddings": _post("Refused: models here generate text.", EmbeddingRequest, ErrorBody),
            "/tokenize": _post("Text to token ids.", TokenizeRequest, TokenizeResponse),
            "/detokenize": _post("Token ids to text.", DetokenizeRequest, DetokenizeResponse),
            "/v1/models": _get("The models served.", ModelList),
            "/v1/models/{name}": {**_get("One model.", ModelCard), "parameters": [name]},
            "/status.json": _get("What the page at / shows.", Status),
            "/health": _get("Whether the engines move.", HealthResponse, HealthResponse),
            "/ready": _get("Whether new requests are taken.", HealthResponse, HealthResponse),
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _add_neutral(schema: dict[str, Any], table: dict[str, Field]) -> None:
    """Adds the fields that are accepted with values that change nothing, and the refused ones as null."""
    for name, field in table.items():
        if field.use is Use.HONOURED:
            continue
        if field.use is Use.NEUTRAL and field.neutral == ("any value",):
            schema["properties"][name] = {"description": field.why}
        else:
            schema["properties"][name] = {"enum": [None, *field.neutral], "description": field.why}


def _content(kind: type[msgspec.Struct], media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": _TEMPLATE.format(name=kind.__name__)}}}


def _responses(ok: dict[str, Any], unavailable: type[msgspec.Struct] | None = None) -> dict[str, Any]:
    error = {"description": "Refused or failed: code and sentence.", "content": _content(ErrorBody)}
    responses = {"200": {"description": "Done.", "content": ok}, "default": error}
    if unavailable is not None:
        responses["503"] = {"description": "Not now.", "content": _content(unavailable)}
    return responses


def _post(
    summary: str,
    request: type[msgspec.Struct],
    response: type[msgspec.Struct],
    event: type[msgspec.Struct] | None = None,
) -> dict[str, Any]:
    ok = _content(response)
    if event is not None:
        ok |= _content(event, "text/event-stream")
    body = {"required": True, "content": _content(request)}
    return {"post": {"summary": summary, "requestBody": body, "responses": _responses(ok)}}


def _get(
    summary: str, response: type[msgspec.Struct], unavailable: type[msgspec.Struct] | None = None
) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(_content(response), unavailable)}}
