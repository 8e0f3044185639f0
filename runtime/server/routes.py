"""The routes. Each handler hands its request on and says nothing of its own."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .body import read_body
from .decode import decode_body
from .fields import DETOKENIZE_FIELDS, EMBEDDING_FIELDS, TOKENIZE_FIELDS
from .generate import generate_chat, generate_completion, generate_response
from .metrics import CONTENT_TYPE
from .openapi import openapi_document
from .requests import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .responses import HealthResponse, ModelList
from .state import ServerState
from .status import PAGE_HEADERS, status_of, status_page
from .text_routes import alive, detokenize, model_card, model_cards, no_embeddings, takes_requests, tokenize


def make_routes(state: ServerState) -> list[Route]:
    """All routes over `state`. Those that machines look at ask for no key."""
    return [*_generation_routes(state), *_model_routes(state), *_open_routes(state)]


def _owner(state: ServerState, request: Request) -> str:
    """Whose key came with the request; a 401 otherwise. Comes before anything is read."""
    return state.keys.owner_of(request.headers.get("authorization"))


def _generation_routes(state: ServerState) -> list[Route]:
    async def completions(request: Request) -> Response:
        return await generate_completion(state, request, _owner(state, request))

    async def chat(request: Request) -> Response:
        return await generate_chat(state, request, _owner(state, request))

    async def responses(request: Request) -> Response:
        return await generate_response(state, request, _owner(state, request))

    async def embeddings(request: Request) -> Response:
        _owner(state, request)
        body = await read_body(request, state.config)
        raise no_embeddings(state, decode_body(body, EmbeddingRequest, EMBEDDING_FIELDS))

    return [
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def _model_routes(state: ServerState) -> list[Route]:
    async def models(request: Request) -> Response:
        _owner(state, request)
        return as_json(ModelList(data=model_cards(state)))

    async def model(request: Request) -> Response:
        _owner(state, request)
        name = str(request.path_params["name"])
        return as_json(model_card(state.model(name), name))

    async def tokenize_text(request: Request) -> Response:
        _owner(state, request)
        body = await read_body(request, state.config)
        return as_json(await tokenize(state, decode_body(body, TokenizeRequest, TOKENIZE_FIELDS)))

    async def detokenize_ids(request: Request) -> Response:
        _owner(state, request)
        body = await read_body(request, state.config)
        return as_json(await detokenize(state, decode_body(body, DetokenizeRequest, DETOKENIZE_FIELDS)))

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/tokenize", tokenize_text, methods=["POST"]),
        Route("/detokenize", detokenize_ids, methods=["POST"]),
    ]


def _open_routes(state: ServerState) -> list[Route]:
    async def health(_: Request) -> Response:
        return _as_health(alive(state))

    async def ready(_: Request) -> Response:
        return _as_health(takes_requests(state))

    async def metrics(_: Request) -> Response:
        return Response(state.metrics.expose(), headers={"content-type": CONTENT_TYPE})

    async def openapi(_: Request) -> Response:
        return Response(msgspec.json.encode(openapi_document()), media_type="application/json")

    async def page(_: Request) -> Response:
        return Response(status_page(), headers=PAGE_HEADERS)

    async def status(_: Request) -> Response:
        return as_json(status_of(state))

    return [
        Route("/", page, methods=["GET"]),
        Route("/status.json", status, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def _as_health(health: HealthResponse) -> Response:
    return as_json(health, 200 if health.status == "ok" else 503)


def as_json(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
