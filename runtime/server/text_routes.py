"""What the routes around generation answer: tokenising both ways, a model's card, health."""

from __future__ import annotations

import asyncio

from .errors import ServingError, bad_request
from .requests import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .responses import DetokenizeResponse, HealthResponse, ModelCard, TokenizeResponse
from .state import ServedModel, ServerState
from .tools import template_tool


async def tokenize(state: ServerState, asked: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or a conversation, as a generation route would see them."""
    model = state.model(asked.model)
    codec = model.codec
    if (asked.prompt is None) == (asked.messages is None):
        raise bad_request(
            "request.prompt",
            "The request must have either prompt or messages.",
            "One text is turned into tokens at a time.",
            "Send one of them.",
            "prompt",
        )

    def encode() -> tuple[int, ...]:
        if asked.messages is not None:
            tools = None if asked.tools is None else [template_tool(tool) for tool in asked.tools]
            return codec.encode_chat(
                asked.messages, asked.add_generation_prompt, asked.chat_template_kwargs, tools
            ).token_ids
        return codec.encode(asked.prompt or "", asked.add_special_tokens)

    token_ids = await asyncio.to_thread(encode)
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=codec.limits.max_model_len,
        tokens=list(token_ids),
        token_strs=[codec.show(token_id) for token_id in token_ids] if asked.return_token_strs else None,
    )


async def detokenize(state: ServerState, asked: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    codec = state.model(asked.model).codec
    return DetokenizeResponse(prompt=await asyncio.to_thread(codec.decode, asked.tokens))


def no_embeddings(state: ServerState, asked: EmbeddingRequest) -> ServingError:
    """Compiled programs end in logits: none of them gives its hidden states away."""
    name = state.model(asked.model).name
    return bad_request(
        "request.no_embeddings",
        f"The model {name} makes no embeddings.",
        "It was compiled to generate text.",
        "Use a model for embeddings on a server that has one.",
        "model",
    )


def model_card(model: ServedModel, name: str) -> ModelCard:
    """The card of a model under `name`, its own or an alias."""
    return ModelCard(
        id=name,
        created=model.created,
        max_model_len=model.codec.limits.max_model_len,
        root=model.name,
    )


def model_cards(state: ServerState) -> list[ModelCard]:
    """A card for every name that requests may use."""
    return [
        model_card(model, name) for model in state.models.values() for name in (model.name, *model.aliases)
    ]


def alive(state: ServerState) -> HealthResponse:
    """Whether all engines move, and which had to be started again."""
    failure = state.failure()
    return HealthResponse(status="failed" if failure else "ok", why=failure or state.restarted())


def takes_requests(state: ServerState) -> HealthResponse:
    """Whether a new request would be taken."""
    if state.is_draining:
        return HealthResponse(status="draining", why="The server is shutting down.")
    starting = state.starting()
    if starting is not None:
        why = " ".join([f"The engine of {starting} is being started again.", state.restarted() or ""])
        return HealthResponse(status="starting", why=why.strip())
    return alive(state)
