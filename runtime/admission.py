"""What can be served at all: the limits of one engine, and requests held against them. Arithmetic and checks
only; nothing is queued or changed here."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec.errors import RequestError, UsageError
from .config import RuntimeConfig
from .protocol import ExecutorCaps
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What executor, cache and settings allow together. `max_model_len` is prompt plus output, in tokens."""

    vocab_size: int
    max_requests: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int


def make_limits(config: RuntimeConfig, caps: ExecutorCaps, cache_tokens: int | None) -> EngineLimits:
    """The limits of an engine whose cache holds a sequence of at most `cache_tokens` (None: any).

    UsageError when a `max_model_len` was asked for that model or cache cannot hold, with both numbers.
    """
    allowed = caps.max_context if cache_tokens is None else min(caps.max_context, cache_tokens)
    wanted = config.max_model_len if config.max_model_len is not None else allowed
    if wanted > allowed or allowed < 2:
        by_cache = cache_tokens is not None and cache_tokens < caps.max_context
        raise UsageError(
            "runtime.max_model_len",
            f"A sequence of {max(wanted, 2)} tokens was asked for, and at most {allowed} fit.",
            f"The {'cache' if by_cache else 'model'} holds no more.",
            f"{'Give the cache more bytes, or lower' if by_cache else 'Lower'} max_model_len to {allowed}.",
        )
    max_requests = min(config.max_requests, caps.max_rows)
    max_step_tokens = min(config.max_step_tokens, caps.max_tokens)
    return EngineLimits(
        vocab_size=caps.vocab_size,
        max_requests=min(max_requests, max_step_tokens),
        max_step_tokens=max_step_tokens,
        max_model_len=wanted,
        max_waiting=config.max_waiting,
    )


def check_prompt(token_ids: tuple[int, ...], limits: EngineLimits) -> None:
    """RequestError for a prompt that is empty, too long, or has token ids the model does not know."""
    if not token_ids:
        raise RequestError(
            "request.empty_prompt",
            "The prompt is empty.",
            "A model continues a text and needs at least one token of it.",
            "Send some text, or the beginning-of-text token as an explicit token id.",
        )
    if len(token_ids) >= limits.max_model_len:
        raise RequestError(
            "request.prompt_too_long",
            f"The prompt has {len(token_ids)} tokens, and the context is {limits.max_model_len} tokens.",
            "Prompt and at least one generated token must fit into the context.",
            f"Shorten the prompt to at most {limits.max_model_len - 1} tokens.",
        )
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < limits.vocab_size:
            raise RequestError(
                "request.token_out_of_range",
                f"Token {index} of the prompt is {token_id}.",
                f"The model's vocabulary has the ids 0 to {limits.vocab_size - 1}.",
                "Use token ids of this model's tokenizer.",
            )


def check_request(request: Request, limits: EngineLimits, num_waiting: int) -> None:
    """RequestError when `request` cannot be served with `num_waiting` others in the queue."""
    check_prompt(request.prompt_token_ids, limits)
    if request.num_prompt_tokens + request.max_tokens > limits.max_model_len:
        raise RequestError(
            "request.max_tokens",
            f"max_tokens is {request.max_tokens} behind a prompt of {request.num_prompt_tokens} tokens.",
            f"Together they exceed the context of {limits.max_model_len} tokens.",
            f"Ask for at most {limits.max_model_len - request.num_prompt_tokens} tokens, or leave it out.",
        )
    if num_waiting >= limits.max_waiting:
        raise RequestError(
            "request.queue_full",
            f"{num_waiting} requests are waiting already.",
            f"The queue holds at most {limits.max_waiting}.",
            "Try again later.",
        )
