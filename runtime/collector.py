"""Chunks of one request put together again, with the times they came. Knows nothing of how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .outputs import Completion, GenerationOutput, StreamChunk
from .protocol import TokenLogprob
from .session import Session


@dataclass(slots=True)
class _Parts:
    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    drafted_at: list[int] = field(default_factory=list[int])
    accepted_at: list[int] = field(default_factory=list[int])
    first_s: float | None = None
    last_s: float = 0.0
    end: StreamChunk | None = None


class Collector:
    """Gathers all completions of a session. Times count from the request's arrival on the engine's clock."""

    def __init__(self, session: Session, prompt: str | Sequence[int]) -> None:
        self._request_id = session.request_id
        self._prompt = prompt if isinstance(prompt, str) else None
        self._prompt_token_ids = session.requests[0].prompt_token_ids
        self._arrival_s = session.requests[0].arrival_s
        self._parts = [_Parts() for _ in session.requests]
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_cached_tokens = 0
        self._is_replayed = False

    def take(self, chunk: StreamChunk) -> bool:
        """Adds a chunk; True when it was the last of the request."""
        parts = self._parts[chunk.index]
        parts.last_s = chunk.time_s - self._arrival_s
        if chunk.token_ids and parts.first_s is None:
            parts.first_s = parts.last_s
        parts.texts.append(chunk.text)
        parts.token_ids.extend(chunk.token_ids)
        parts.logprobs.extend(chunk.logprobs)
        if chunk.num_drafted:
            _count(parts.drafted_at, chunk.num_drafted, chunk.num_drafted)
            _count(parts.accepted_at, chunk.num_drafted, chunk.num_accepted)
        self._prompt_logprobs.extend(chunk.prompt_logprobs)
        if chunk.finish_reason is None:
            return False
        parts.end = chunk
        self._is_replayed = chunk.is_replayed
        self._num_cached_tokens = max(self._num_cached_tokens, chunk.num_cached_tokens)
        return all(each.end is not None for each in self._parts)

    def output(self) -> GenerationOutput:
        """The whole, once `take` has returned True."""
        return GenerationOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            completions=tuple(_completion(index, parts) for index, parts in enumerate(self._parts)),
            prompt_logprobs=tuple(self._prompt_logprobs),
            num_cached_tokens=self._num_cached_tokens,
            is_replayed=self._is_replayed,
        )


def _completion(index: int, parts: _Parts) -> Completion:
    end = parts.end
    assert end is not None, "a completion was read before its end"
    assert end.finish_reason is not None
    return Completion(
        index=index,
        token_ids=tuple(parts.token_ids),
        text="".join(parts.texts),
        finish_reason=end.finish_reason,
        stop_reason=end.stop_reason,
        logprobs=tuple(parts.logprobs),
        error=end.error,
        ttft_s=parts.first_s,
        e2e_s=parts.last_s,
        drafted_at=tuple(parts.drafted_at),
        accepted_at=tuple(parts.accepted_at),
    )


def _count(places: list[int], num_places: int, num_counted: int) -> None:
    """One more at each of the first `num_counted` of `num_places` places."""
    places.extend([0] * (num_places - len(places)))
    for place in range(num_counted):
        places[place] += 1
