"""From a decoded request to its answer: admission, plan, run, writer. The one place where these meet."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ...spec.errors import LlmcError
from .backlog import Place
from .body import read_body
from .chat_writer import ChatWriter
from .completion_writer import CompletionWriter
from .decode import decode_body
from .errors import bad_request
from .fields import CHAT_FIELDS, COMPLETION_FIELDS, RESPONSES_FIELDS
from .plan import Plan, count_sequences, plan_chat, plan_completion, split_prompts
from .reply import reply_stream, reply_whole
from .requests import ChatRequest, CompletionRequest, GenerationFields, ResponsesRequest
from .responses import Usage
from .responses_input import as_chat
from .responses_writer import ResponsesWriter
from .run import Run
from .state import ServedModel, ServerState
from .writer import Heading, Writer

T = TypeVar("T")
_LARGE_BODY = 16384  # tokenising more than this would hold up other requests


async def generate_completion(state: ServerState, request: Request, owner: str) -> Response:
    """/v1/completions. Raises LlmcError for everything that is not a 200."""
    arrival_s = state.clock()
    state.check_admits()
    body = await read_body(request, state.config)
    asked = decode_body(body, CompletionRequest, COMPLETION_FIELDS)
    state.model(asked.model)
    num_sequences = count_sequences(asked, len(split_prompts(asked.prompt)), state.config)

    def plan(model: ServedModel) -> tuple[Plan, list[str] | None]:
        defaults = model.client.facts.defaults
        made = plan_completion(asked, model.codec, defaults, state.config, state.draw_seed)
        return made, _echoed(asked, model, made) if asked.echo else None

    check_stream_options(asked)
    model, place, made = await _admit(state, asked, owner, num_sequences, plan, len(body))
    run = _start(model, place, made[0], arrival_s)
    writer = CompletionWriter(
        _heading("cmpl", asked, model),
        run.plan,
        model.codec,
        echoed=made[1],
        with_token_ids=asked.return_token_ids,
        reports_usage=_wants_usage(asked),
        usage_so_far=_continuous(asked, run),
    )
    return await _reply(state, run, writer, asked, request)


async def generate_chat(state: ServerState, request: Request, owner: str) -> Response:
    """/v1/chat/completions. Raises LlmcError for everything that is not a 200."""
    arrival_s = state.clock()
    state.check_admits()
    body = await read_body(request, state.config)
    asked = decode_body(body, ChatRequest, CHAT_FIELDS)
    state.model(asked.model)
    num_sequences = count_sequences(asked, 1, state.config)

    def plan(model: ServedModel) -> Plan:
        return plan_chat(asked, model.codec, model.client.facts.defaults, state.config, state.draw_seed)

    check_stream_options(asked)
    model, place, made = await _admit(state, asked, owner, num_sequences, plan, len(body))
    run = _start(model, place, made, arrival_s)
    writer = ChatWriter(
        _heading("chatcmpl", asked, model),
        made,
        model.codec,
        shows_thoughts=asked.include_reasoning,
        with_token_ids=asked.return_token_ids,
        reports_usage=_wants_usage(asked),
        usage_so_far=_continuous(asked, run),
    )
    return await _reply(state, run, writer, asked, request)


async def generate_response(state: ServerState, request: Request, owner: str) -> Response:
    """/v1/responses. Raises LlmcError for everything that is not a 200."""
    arrival_s = state.clock()
    state.check_admits()
    body = await read_body(request, state.config)
    given = decode_body(body, ResponsesRequest, RESPONSES_FIELDS)
    asked = as_chat(given)

    def plan(model: ServedModel) -> Plan:
        return plan_chat(asked, model.codec, model.client.facts.defaults, state.config, state.draw_seed)

    model, place, made = await _admit(state, asked, owner, 1, plan, len(body))
    run = _start(model, place, made, arrival_s)
    writer = ResponsesWriter(_heading("resp", asked, model, "_"), made, given)
    if not asked.stream:
        return await reply_whole(run, writer, request)
    return await reply_stream(
        run, writer, request, with_usage=True, send_timeout_s=state.config.send_timeout_s
    )


async def _admit(
    state: ServerState,
    asked: GenerationFields,
    owner: str,
    num_sequences: int,
    plan: Callable[[ServedModel], T],
    num_bytes: int,
) -> tuple[ServedModel, Place, T]:
    """The model that answers, the request's place there, and its plan: the model asked for, or else the
    fallback that its settings name for such a case."""
    model = state.model(asked.model)
    reasons: list[tuple[ServedModel, str]] = []
    while True:
        try:
            place = _enter(model, owner, num_sequences)
            made = await _planned(model, place, functools.partial(plan, model), num_bytes)
        except LlmcError as error:
            reason = _fallback_reason(error)
            after = state.models.get(model.fallback or "")
            if after is None or reason not in model.fallback_on or not _is_roomier(after, model, reason):
                raise
            reasons.append((model, reason))
            model = after
            continue
        for before, reason in reasons:
            before.metrics.fell_back(reason)
        return model, place, made


def _fallback_reason(error: LlmcError) -> str:
    """What a fallback could mend; nothing where it is empty."""
    if error.code == "server.overloaded":
        return "overload"
    return "long_prompt" if error.code in ("request.prompt_too_long", "request.max_tokens") else ""


def _is_roomier(after: ServedModel, before: ServedModel, reason: str) -> bool:
    return reason != "long_prompt" or after.codec.limits.max_model_len > before.codec.limits.max_model_len


def _enter(model: ServedModel, owner: str, num_sequences: int) -> Place:
    try:
        return model.backlog.enter(owner, num_sequences)
    except LlmcError as error:
        model.metrics.rejected(error.code)
        raise


async def _planned(model: ServedModel, place: Place, plan: Callable[[], T], num_bytes: int) -> T:
    """Tokenises, beside the event loop where that takes long. What is refused gives its place back."""
    try:
        return plan() if num_bytes < _LARGE_BODY else await asyncio.to_thread(plan)
    except BaseException as error:
        model.backlog.leave(place)
        if isinstance(error, LlmcError):
            model.metrics.rejected(error.code)
        raise


def _start(model: ServedModel, place: Place, plan: Plan, arrival_s: float) -> Run:
    try:
        return Run(plan, model.client, model.backlog, place, model.metrics, arrival_s, model.live)
    except BaseException:
        model.backlog.leave(place)
        raise


async def _reply(
    state: ServerState, run: Run, writer: Writer, asked: GenerationFields, request: Request
) -> Response:
    if not asked.stream:
        return await reply_whole(run, writer, request)
    return await reply_stream(
        run, writer, request, with_usage=_wants_usage(asked), send_timeout_s=state.config.send_timeout_s
    )


def check_stream_options(asked: GenerationFields) -> None:
    """A 400 for stream options without a stream."""
    if asked.stream_options is not None and not asked.stream:
        raise bad_request(
            "request.stream_options",
            "stream_options are given and stream is not true.",
            "They say how to stream.",
            "Set stream to true, or leave them out.",
            "stream_options",
        )


def _echoed(asked: CompletionRequest, model: ServedModel, plan: Plan) -> list[str]:
    """The prompts as text, as they were sent where they were text."""
    prompts = split_prompts(asked.prompt)
    return [
        prompt if isinstance(prompt, str) else model.codec.decode(token_ids)
        for prompt, token_ids in zip(prompts, plan.prompts, strict=True)
    ]


def _heading(prefix: str, asked: GenerationFields, model: ServedModel, between: str = "-") -> Heading:
    name = asked.request_id or secrets.token_hex(12)
    return Heading(id=f"{prefix}{between}{name}", created=int(time.time()), model=model.name)


def _wants_usage(asked: GenerationFields) -> bool:
    return asked.stream and asked.stream_options is not None and asked.stream_options.include_usage


def _continuous(asked: GenerationFields, run: Run) -> Callable[[], Usage] | None:
    options = asked.stream_options
    return run.usage if asked.stream and options is not None and options.continuous_usage_stats else None
