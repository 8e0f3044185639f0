"""One caller's request and its completions: engine outputs in, chunks of text out, stop strings found on the
way. Knows text and tokens; no threads, no scheduling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from .detokenize import Detokenizer
from .outputs import StreamChunk
from .params import SamplingParams
from .request import FinishReason, Request, RequestOutput
from .response_cache import Recorder, ReplayChunk
from .stops import StopMatcher
from .tokenizer import Tokenizer

_BAD_ENDINGS = (FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR)
Sink = Callable[["StreamChunk | Exception"], None]


class TextState:
    """The text of one completion. Stop strings are looked for from `min_tokens` on."""

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._detokenizer = (
            Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens) if tokenizer is not None else None
        )
        self._matcher = StopMatcher(params.stop)
        self._has_stops = bool(params.stop)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push_all(self, token_ids: Sequence[int]) -> tuple[str, int, str | None]:
        """(text that may be shown, tokens that belong to it, stop string that was met) of some tokens."""
        if not self._has_stops:
            shown = self._detokenizer.push_all(token_ids) if self._detokenizer is not None else ""
            return shown, len(token_ids), None
        pieces: list[str] = []
        for place, token_id in enumerate(token_ids):
            piece, matched = self.push(token_id)
            pieces.append(piece)
            if matched is not None:
                return "".join(pieces), place + 1, matched
        return "".join(pieces), len(token_ids), None

    def push(self, token_id: int) -> tuple[str, str | None]:
        """(text that may be shown, stop string that was met)."""
        self._num_tokens += 1
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.push(token_id)
        if self._num_tokens < self._min_tokens:
            return text, None
        result = self._matcher.push(text)
        return result.text, result.matched

    def finish(self) -> tuple[str, str | None]:
        """The rest, when the tokens have ended without a stop string."""
        if self._detokenizer is None:
            return "", None
        result = self._matcher.push(self._detokenizer.finish())
        return result.text + ("" if result.matched else self._matcher.finish()), result.matched


@dataclass(slots=True)
class _Amount:
    """How much of a completion."""

    text: int = 0
    tokens: int = 0
    prompt_logprobs: int = 0


@dataclass(slots=True)
class _Completion:
    """One of the `n` engine requests of a session. `told` is what its caller has, and `skipped` what of that
    is still to come a second time."""

    index: int
    request: Request
    text: TextState
    is_open: bool = True
    told: _Amount = field(default_factory=_Amount)
    skipped: _Amount = field(default_factory=_Amount)

    def news(self, chunk: StreamChunk) -> StreamChunk:
        """`chunk` without what the caller has."""
        skipped, told = self.skipped, self.told
        text, tokens = min(skipped.text, len(chunk.text)), min(skipped.tokens, len(chunk.token_ids))
        prompt = min(skipped.prompt_logprobs, len(chunk.prompt_logprobs))
        if text or tokens or prompt:
            chunk = msgspec.structs.replace(
                chunk,
                text=chunk.text[text:],
                token_ids=chunk.token_ids[tokens:],
                logprobs=chunk.logprobs[tokens:],
                prompt_logprobs=chunk.prompt_logprobs[prompt:],
            )
            skipped.text, skipped.tokens = skipped.text - text, skipped.tokens - tokens
            skipped.prompt_logprobs -= prompt
        told.text, told.tokens = told.text + len(chunk.text), told.tokens + len(chunk.token_ids)
        told.prompt_logprobs += len(chunk.prompt_logprobs)
        return chunk


class Session:
    """Turns what the engine says about a caller's `n` requests into chunks for `sink`.

    Every completion ends exactly once, with a chunk that has a `finish_reason`. `response_key` is what a
    deterministic response is known by, None for any other; `recorder`, where set, hears every chunk too, and
    `relay` every one but bad endings.
    """

    def __init__(
        self,
        request_id: str,
        requests: Sequence[Request],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        sink: Sink,
        clock: Callable[[], float],
        response_key: bytes | None = None,
    ) -> None:
        self.request_id = request_id
        self.requests = tuple(requests)
        self._sink = sink
        self._clock = clock
        self.response_key = response_key
        self.recorder: Recorder | None = None
        self.relay: Callable[[StreamChunk], None] | None = None
        self._completions = {
            request.request_id: _Completion(
                index, request, TextState(tokenizer, request.prompt_token_ids, params)
            )
            for index, request in enumerate(requests)
        }

    @property
    def open_ids(self) -> tuple[int, ...]:
        """Engine requests that have not ended for the caller."""
        return tuple(number for number, each in self._completions.items() if each.is_open)

    @property
    def has_deadline(self) -> bool:
        return self.requests[0].deadline_s is not None

    def take(self, output: RequestOutput) -> bool:
        """Passes on one engine output. True when the text met a stop string, so that the engine must
        end the request."""
        completion = self._completions[output.request_id]
        if not completion.is_open:
            return False
        finished = output.finished
        text, num_kept, matched = self._read(completion, output)
        token_ids = output.token_ids[:num_kept]
        reason: FinishReason | None = None
        stop_reason: str | int | None = matched
        if matched is not None:
            reason = FinishReason.STOP
        elif finished is not None:
            reason = finished.reason
            rest, matched_late = completion.text.finish()
            text += rest
            if matched_late is not None:
                reason, stop_reason = FinishReason.STOP, matched_late
            elif reason is FinishReason.STOP and completion.request.stop_token_ids.issuperset(token_ids[-1:]):
                stop_reason = token_ids[-1] if token_ids else None
        completion.is_open = reason is None
        if text or token_ids or output.prompt_logprobs or reason is not None:
            chunk = StreamChunk(
                request_id=self.request_id,
                index=completion.index,
                text=text,
                token_ids=token_ids,
                logprobs=output.logprobs[:num_kept],
                prompt_logprobs=output.prompt_logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                error=finished.error if finished is not None else None,
                num_cached_tokens=output.num_cached_tokens,
                num_drafted=output.num_drafted,
                num_accepted=output.num_accepted,
                admitted_s=output.admitted_s,
                time_s=self._clock(),
            )
            if self.recorder is not None:
                self.recorder.add(chunk)
            self._pass_on(completion, chunk)
            if self.relay is not None and reason not in _BAD_ENDINGS:
                self.relay(chunk)
        return matched is not None and finished is None

    def replay(self, chunks: Sequence[ReplayChunk]) -> None:
        """Tells what is known of the response already, in the pieces it was made in."""
        num_prompt_tokens = self.requests[0].num_prompt_tokens
        now_s = self._clock()
        completions = list(self._completions.values())
        for chunk in chunks:
            completion = completions[chunk.index]
            completion.is_open = chunk.finish_reason is None
            self._pass_on(
                completion,
                StreamChunk(
                    request_id=self.request_id,
                    index=chunk.index,
                    text=chunk.text,
                    token_ids=chunk.token_ids,
                    logprobs=chunk.logprobs,
                    prompt_logprobs=chunk.prompt_logprobs,
                    finish_reason=chunk.finish_reason,
                    stop_reason=chunk.stop_reason,
                    num_cached_tokens=num_prompt_tokens,
                    admitted_s=now_s,
                    time_s=now_s,
                    is_replayed=True,
                ),
            )

    def start_over(self) -> None:
        """Whoever was followed has ended badly: what comes from now on comes from the start, and what the
        caller has of it is left out."""
        for completion in self._completions.values():
            completion.skipped = replace(completion.told)

    def abandon(self) -> None:
        """Ends what is open with reason ABORT, for a session that the engine does not know."""
        for completion in self._completions.values():
            if completion.is_open:
                completion.is_open = False
                self._sink(
                    StreamChunk(
                        request_id=self.request_id,
                        index=completion.index,
                        finish_reason=FinishReason.ABORT,
                        time_s=self._clock(),
                    )
                )

    def _pass_on(self, completion: _Completion, chunk: StreamChunk) -> None:
        chunk = completion.news(chunk)
        if chunk.text or chunk.token_ids or chunk.prompt_logprobs or chunk.finish_reason is not None:
            self._sink(chunk)

    def fail(self, error: Exception) -> None:
        """The engine is gone, or refused the request: the caller gets the error itself."""
        for completion in self._completions.values():
            completion.is_open = False
        self._sink(error)

    def _read(self, completion: _Completion, output: RequestOutput) -> tuple[str, int, str | None]:
        """(text, tokens that belong to it, stop string) of new tokens; a stop token has no text."""
        token_ids = output.token_ids
        ends = output.finished is not None and output.finished.reason is FinishReason.STOP
        if not ends or not completion.request.stop_token_ids.issuperset(token_ids[-1:]):
            return completion.text.push_all(token_ids)
        text, num_kept, matched = completion.text.push_all(token_ids[:-1])
        return text, num_kept if matched is not None else len(token_ids), matched
