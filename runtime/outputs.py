"""What a caller gets back: chunks while a text grows, and the whole when it has ended. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from .protocol import TokenLogprob
from .request import FinishReason


class StreamChunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """News of completion number `index` of one request. Text may come later than its tokens, never before.
    `stop_reason` is the stop string or token id that ended it; `error` is one line for reason ERROR.
    `num_cached_tokens` of the prompt came from the prefix cache; `time_s` is the engine's clock, and so is
    `admitted_s`, when it left the queue for the first time. Of `num_drafted` drafts that were verified for it
    the first `num_accepted` were accepted. `is_replayed`: it comes from the response cache, and all of the
    prompt counts as cached."""

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    admitted_s: float | None = None
    time_s: float = 0.0
    is_replayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished continuation. `token_ids` include a stop token; `text` does not. `drafted_at[i]` counts
    the drafts at place i that were verified, `accepted_at[i]` those of them that were accepted."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None
    ttft_s: float | None = None
    e2e_s: float = 0.0
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token behind the first; None with fewer than two tokens."""
        if self.ttft_s is None or len(self.token_ids) < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (len(self.token_ids) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """All completions of one prompt; the properties are those of the first. `prompt_logprobs` has one
    entry for each prompt token but the first, when asked for. `is_replayed`: nothing was computed, the same
    request was answered before."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    is_replayed: bool = False

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def ttft_s(self) -> float | None:
        return self.completions[0].ttft_s

    @property
    def tpot_s(self) -> float | None:
        return self.completions[0].tpot_s
