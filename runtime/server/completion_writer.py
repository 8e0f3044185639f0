"""Answers of /v1/completions: text, echo, and logprobs in the legacy shape that evaluation harnesses read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from ...spec.errors import LlmcError
from ..protocol import TokenLogprob
from .codec import Codec
from .errors import error_body
from .plan import Plan
from .responses import CompletionChoice, CompletionLogprobs, CompletionResponse, Usage
from .run import Piece
from .writer import Heading, finish_of


@dataclass(slots=True)
class _Prompt:
    """Echo: the prompt's logprobs as they come, and what must wait for them."""

    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    held: list[Piece] = field(default_factory=list[Piece])
    is_known: bool = False


class CompletionWriter:
    """`echoed` are the prompts as text, or None. `usage_so_far` is asked for every chunk where continuous
    usage is wanted; `reports_usage` puts `usage: null` into the others, as OpenAI does."""

    ends_with_done = True

    def __init__(
        self,
        heading: Heading,
        plan: Plan,
        codec: Codec,
        *,
        echoed: Sequence[str] | None = None,
        with_token_ids: bool = False,
        reports_usage: bool = False,
        usage_so_far: Callable[[], Usage] | None = None,
    ) -> None:
        self._heading = heading
        self._plan = plan
        self._codec = codec
        self._echoed = echoed
        self._with_token_ids = with_token_ids
        self._reports_usage = reports_usage
        self._usage_so_far = usage_so_far
        self._with_logprobs = plan.params[0].logprobs is not None
        self._prompts = [_Prompt() for _ in plan.prompts]
        self._offsets = [0] * plan.num_sequences
        self._begun = [False] * plan.num_sequences
        self._is_first = True

    def chunks(self, pieces: Sequence[Piece]) -> list[msgspec.Struct]:
        return [self._wrap([choice]) for choice in self._choices(pieces)]

    def usage_chunk(self, usage: Usage) -> CompletionResponse:
        heading = self._heading
        return CompletionResponse(
            id=heading.id, created=heading.created, model=heading.model, choices=[], usage=usage
        )

    def failure(self, error: LlmcError) -> msgspec.Struct:
        return error_body(error)

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> CompletionResponse:
        parts: list[list[CompletionChoice]] = [[] for _ in range(self._plan.num_sequences)]
        for choice in self._choices(pieces):
            parts[choice.index].append(choice)
        heading = self._heading
        return CompletionResponse(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            choices=[_joined(each) for each in parts],
            usage=usage,
            sampling=self._plan.params[0],
        )

    def _wrap(self, choices: list[CompletionChoice]) -> CompletionResponse:
        heading = self._heading
        usage = self._usage_so_far() if self._usage_so_far else None if self._reports_usage else msgspec.UNSET
        sampling = self._plan.params[0] if self._is_first else msgspec.UNSET
        self._is_first = False
        return CompletionResponse(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            choices=choices,
            usage=usage,
            sampling=sampling,
        )

    def _choices(self, pieces: Sequence[Piece]) -> list[CompletionChoice]:
        return [choice for piece in self._ready(pieces) if (choice := self._choice(piece)) is not None]

    def _ready(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces in order; with echo and logprobs, only once the prompt's own logprobs are all there."""
        if self._echoed is None or not self._with_logprobs:
            return list(pieces)
        ready: list[Piece] = []
        for piece in pieces:
            prompt = self._prompts[piece.prompt]
            prompt.logprobs.extend(piece.chunk.prompt_logprobs)
            prompt.held.append(piece)
            prompt.is_known = len(prompt.logprobs) >= len(self._plan.prompts[piece.prompt]) - 1
            if prompt.is_known:
                ready.extend(prompt.held)
                prompt.held.clear()
        return ready

    def _choice(self, piece: Piece) -> CompletionChoice | None:
        """One chunk's choice, with the echo before the first. None where there is nothing to say."""
        chunk, hides = piece.chunk, self._plan.hides_output
        prompt_ids = self._plan.prompts[piece.prompt]
        text = "" if hides else chunk.text
        token_ids = () if hides else chunk.token_ids
        told = () if hides else chunk.logprobs
        is_first = not self._begun[piece.choice]
        if not (text or token_ids or chunk.finish_reason or (is_first and self._echoed is not None)):
            return None
        self._begun[piece.choice] = True
        logprobs: CompletionLogprobs | None = None
        if self._with_logprobs:
            logprobs = self._logprobs(piece, told, with_prompt=is_first and self._echoed is not None)
        if is_first and self._echoed is not None:
            text = self._echoed[piece.prompt] + text
        return CompletionChoice(
            index=piece.choice,
            text=text,
            logprobs=logprobs,
            finish_reason="length" if hides and chunk.finish_reason else finish_of(chunk.finish_reason),
            stop_reason=None if hides else chunk.stop_reason,
            token_ids=list(token_ids) if self._with_token_ids else None,
            prompt_token_ids=list(prompt_ids) if self._with_token_ids and is_first else None,
        )

    def _logprobs(
        self, piece: Piece, told: Sequence[TokenLogprob], *, with_prompt: bool
    ) -> CompletionLogprobs:
        """Lists over the tokens of this chunk; offsets go on from chunk to chunk."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        entries = list(told)
        if with_prompt:
            prompt = self._prompts[piece.prompt]
            tokens.append(self._codec.show(self._plan.prompts[piece.prompt][0]))
            values.append(None)
            tops.append(None)
            entries = [*prompt.logprobs, *told]
        for entry in entries:
            tokens.append(self._codec.show(entry.token_id))
            values.append(entry.logprob)
            tops.append(self._top(entry))
        offsets: list[int] = []
        offset = self._offsets[piece.choice]
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.choice] = offset
        return CompletionLogprobs(
            tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Alternatives by text, best first, and the token itself. Of tokens with one text the best counts."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self._codec.show(token_id), logprob)
        top.setdefault(self._codec.show(entry.token_id), entry.logprob)
        return top


def _joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """The sum of the chunks of one choice."""
    first, last = parts[0], parts[-1]
    told = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=first.index,
        text="".join(part.text for part in parts),
        logprobs=_joined_logprobs(told) if told else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        token_ids=None if first.token_ids is None else [t for part in parts for t in part.token_ids or ()],
        prompt_token_ids=first.prompt_token_ids,
    )


def _joined_logprobs(told: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[each for part in told for each in part.tokens],
        token_logprobs=[each for part in told for each in part.token_logprobs],
        top_logprobs=[each for part in told for each in part.top_logprobs],
        text_offset=[each for part in told for each in part.text_offset],
    )
