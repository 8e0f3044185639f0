"""Answers of /v1/chat/completions: one assistant message per choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ...spec.errors import InternalError, LlmcError
from ..protocol import TokenLogprob
from .codec import Codec
from .errors import error_body
from .plan import Plan
from .responses import (
    ChatChoice,
    ChatChunk,
    ChatDeltaChoice,
    ChatFinish,
    ChatLogprobs,
    ChatResponse,
    ChatTokenLogprob,
    Delta,
    TopLogprob,
    Usage,
)
from .run import Piece
from .voice import Voice, joined_message
from .writer import Heading, finish_of


class ChatWriter:
    """The first chunk of a choice has its role. `usage_so_far` is asked for every chunk where continuous
    usage is wanted; `reports_usage` puts `usage: null` into the others, as OpenAI does."""

    ends_with_done = True

    def __init__(
        self,
        heading: Heading,
        plan: Plan,
        codec: Codec,
        *,
        shows_thoughts: bool = True,
        with_token_ids: bool = False,
        reports_usage: bool = False,
        usage_so_far: Callable[[], Usage] | None = None,
    ) -> None:
        self._heading = heading
        self._plan = plan
        self._codec = codec
        self._with_token_ids = with_token_ids
        self._reports_usage = reports_usage
        self._usage_so_far = usage_so_far
        self._voices = [Voice(plan.style, shows_thoughts) for _ in range(plan.num_sequences)]
        self._is_first = True

    def chunks(self, pieces: Sequence[Piece]) -> list[msgspec.Struct]:
        deltas = map(self._delta, pieces)
        return [self._wrap([delta]) for delta in deltas if _says_something(delta)]

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        heading = self._heading
        return ChatChunk(id=heading.id, created=heading.created, model=heading.model, choices=[], usage=usage)

    def failure(self, error: LlmcError) -> msgspec.Struct:
        return error_body(error)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatResponse:
        parts: list[list[ChatDeltaChoice]] = [[] for _ in range(self._plan.num_sequences)]
        for piece in pieces:
            parts[piece.choice].append(self._delta(piece))
        heading = self._heading
        return ChatResponse(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            choices=[_joined(each) for each in parts],
            usage=usage,
            sampling=self._plan.params[0],
            prompt_token_ids=list(self._plan.prompts[0]) if self._with_token_ids else None,
        )

    def _wrap(self, choices: list[ChatDeltaChoice]) -> ChatChunk:
        heading = self._heading
        usage = self._usage_so_far() if self._usage_so_far else None if self._reports_usage else msgspec.UNSET
        is_first, self._is_first = self._is_first, False
        return ChatChunk(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            choices=choices,
            usage=usage,
            sampling=self._plan.params[0] if is_first else msgspec.UNSET,
            prompt_token_ids=(
                list(self._plan.prompts[0]) if is_first and self._with_token_ids else msgspec.UNSET
            ),
        )

    def _delta(self, piece: Piece) -> ChatDeltaChoice:
        chunk = piece.chunk
        voice = self._voices[piece.choice]
        delta = voice.delta(chunk.text, is_last=chunk.finish_reason is not None)
        logprobs: ChatLogprobs | None = None
        if chunk.logprobs:
            logprobs = ChatLogprobs(content=[self._logprob(entry) for entry in chunk.logprobs])
        finish: ChatFinish | None = finish_of(chunk.finish_reason)
        if finish == "stop" and voice.num_calls:
            finish = "tool_calls"
        return ChatDeltaChoice(
            index=piece.choice,
            delta=delta,
            finish_reason=finish,
            logprobs=logprobs,
            stop_reason=chunk.stop_reason,
            token_ids=list(chunk.token_ids) if self._with_token_ids else None,
        )

    def _logprob(self, entry: TokenLogprob) -> ChatTokenLogprob:
        codec = self._codec
        return ChatTokenLogprob(
            token=codec.show(entry.token_id),
            logprob=entry.logprob,
            bytes=codec.bytes_of(entry.token_id),
            top_logprobs=[
                TopLogprob(token=codec.show(token_id), logprob=logprob, bytes=codec.bytes_of(token_id))
                for token_id, logprob in entry.top
            ],
        )


def _says_something(choice: ChatDeltaChoice) -> bool:
    """False while text is held back until it is known what it is."""
    return bool(choice.delta != Delta() or choice.finish_reason or choice.logprobs or choice.token_ids)


def _joined(parts: Sequence[ChatDeltaChoice]) -> ChatChoice:
    """The sum of the chunks of one choice."""
    first, last = parts[0], parts[-1]
    if last.finish_reason is None:
        raise InternalError(
            "server.no_ending",
            "A choice has no ending.",
            "Its last piece carried no finish reason.",
            "Report this with the request.",
        )
    content = [entry for part in parts if part.logprobs is not None for entry in part.logprobs.content]
    return ChatChoice(
        index=first.index,
        message=joined_message([part.delta for part in parts]),
        finish_reason=last.finish_reason,
        logprobs=ChatLogprobs(content=content) if content else None,
        stop_reason=last.stop_reason,
        token_ids=None if first.token_ids is None else [t for part in parts for t in part.token_ids or ()],
    )
