"""The routes. Each handler hands its request on and says nothing of its own."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .body import read_body
from .decode import decode_body
from .fields import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from .generate import generate_chat, generate_completion
from .metrics import CONTENT_TYPE
from .openapi import openapi_document
from .requests import DetokenizeRequest, TokenizeRequest
from .responses import HealthResponse, ModelList
from .state import ServerState
from .text_routes import detokenize, model_card, tokenize

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})


def make_routes(state: ServerState) -> list[Route]:
    """All routes over `state`. Those of `OPEN_PATHS` ask for no key."""

    def owner(request: Request) -> str:
        return state.keys.owner_of(request.headers.get("authorization"))

    async def completions(request: Request) -> Response:
        return await generate_completion(state, request, owner(request))

    async def chat(request: Request) -> Response:
        return await generate_chat(state, request, owner(request))

    async def models(request: Request) -> Response:
        owner(request)
        return as_json(ModelList(data=[model_card(model) for model in state.models.values()]))

    async def model(request: Request) -> Response:
        owner(request)
        return as_json(model_card(state.model(request.path_params["name"])))

    async def tokenize_text(request: Request) -> Response:
        owner(request)
        body = await read_body(request, state.config)
        return as_json(await tokenize(state, decode_body(body, TokenizeRequest, TOKENIZE_FIELDS)))

    async def detokenize_ids(request: Request) -> Response:
        owner(request)
        body = await read_body(request, state.config)
        return as_json(await detokenize(state, decode_body(body, DetokenizeRequest, DETOKENIZE_FIELDS)))

    async def health(_: Request) -> Response:
        failure = state.failure()
        return as_json(
            HealthResponse(status="failed" if failure else "ok", why=failure), 503 if failure else 200
        )

    async def ready(_: Request) -> Response:
        failure = state.failure()
        if state.is_draining:
            return as_json(HealthResponse(status="draining", why="The server is shutting down."), 503)
        return as_json(
            HealthResponse(status="failed" if failure else "ok", why=failure), 503 if failure else 200
        )

    async def metrics(_: Request) -> Response:
        return Response(state.metrics.expose(), headers={"content-type": CONTENT_TYPE})

    async def openapi(_: Request) -> Response:
        return Response(msgspec.json.encode(openapi_document()), media_type="application/json")

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/tokenize", tokenize_text, methods=["POST"]),
        Route("/detokenize", detokenize_ids, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def as_json(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
