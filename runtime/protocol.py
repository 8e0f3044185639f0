"""The boundary between deciding and doing: what the engine hands to an executor and gets back.

Everything here is plain data over integers; no torch, no model. An executor owns the KV storage,
the permanent rows, and sampling; the engine owns blocks, order, and the life of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from ..spec.cache import CacheLayout

Ticket = NewType("Ticket", int)


class LogitsWanted(Enum):
    """Which rows of a segment produce logits: NONE for an unfinished prefill chunk, LAST to sample
    the next token, ALL for every position of the segment (speculative verification), PROMPT for
    logprobs of the segment's own next tokens."""

    NONE = "none"
    LAST = "last"
    ALL = "all"
    PROMPT = "prompt"


class TokenSource(Enum):
    """Where a segment's input ids come from: the plan, or the row's last sampled token, which may
    still be on the device when the plan is made."""

    IDS = "ids"
    LAST_SAMPLED = "last_sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingState:
    """All that sampling one request depends on. `temperature` 0 is greedy.

    Noise is Philox4x32-10 keyed by (`seed`, position, vocabulary index), so a sampled token depends on
    nothing but its own request. `eos_token_ids` and `stop_token_ids` are masked out while fewer than
    `min_tokens` tokens were generated. `logprobs` is how many top alternatives to return, None for
    none at all. `logit_bias` is pairs (token id, added bias).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    banned_until_min: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEntry:
    """A request takes a permanent row. `prompt_token_ids` are known to the executor for penalties and,
    after a preemption, followed by what was generated: `num_prompt_tokens` tells where."""

    row: int
    request_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingState


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDiff:
    """Rows entered and left since the last diff, applied before the next `submit`.

    A row in both lists leaves first. Leaving a row forgets its tokens; pages are the engine's.
    """

    enter: tuple[RowEntry, ...] = ()
    leave: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`num_tokens` consecutive tokens of one row, at positions `start` ... `start + num_tokens - 1`.

    `token_ids` holds them when `source` is IDS, and is empty when LAST_SAMPLED (then `num_tokens`
    is 1 + len(draft_ids)). `draft_ids` are proposed tokens that follow and are verified: position
    i of the segment samples, and draft i is accepted when it equals that sample.
    """

    row: int
    start: int
    num_tokens: int
    source: TokenSource = TokenSource.IDS
    token_ids: tuple[int, ...] = ()
    draft_ids: tuple[int, ...] = ()
    logits: LogitsWanted = LogitsWanted.LAST


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChange:
    """Entry `index` of `row`'s block table in cache group `group` becomes physical `block`
    (-1: the page was freed because its window has passed)."""

    group: int
    row: int
    index: int
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """Physical page `source` of `group` is copied to `target` before the step runs."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step over a ragged batch. `epoch` grows by one a step; a block freed in epoch e may be
    written again only by plans made after the result of epoch e was collected.

    `grammar_mask` is uint32 `[len(segments), ceil(vocab / 32)]`, bit set = allowed, or None; for a
    segment with drafts it holds one row per position, in `segments` order.
    """

    step_id: int
    epoch: int
    segments: tuple[Segment, ...]
    block_changes: tuple[BlockChange, ...] = ()
    block_copies: tuple[BlockCopy, ...] = ()
    grammar_mask: NDArray[np.uint32] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens over all segments: the T of the graph."""
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token before temperature and filters, with its rank (0 = top) and the
    top alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What one segment produced. `token_ids` has 1 + `num_accepted` sampled tokens, none when the
    segment wanted no logits; `finite` is False when its logits held NaN or infinities, and then
    `token_ids` is empty."""

    row: int
    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Results in the order of the plan's segments."""

    step_id: int
    epoch: int
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """Proposed continuations, one tuple per asked row, each of at most k tokens."""

    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorCaps:
    """What an executor offers. `num_blocks` is the number of physical pages per cache group."""

    name: str
    vocab_size: int
    max_context: int
    max_rows: int
    max_tokens: int
    max_in_flight: int
    cache: CacheLayout
    num_blocks: tuple[int, ...]
    can_propose: bool = False
    details: dict[str, str] = field(default_factory=dict[str, str])


class Executor(Protocol):
    """Runs steps. Asynchronous: up to `caps.max_in_flight` tickets may be open; they are collected in
    order. A step that raises from `submit` or `collect` has changed nothing the engine relies on:
    the pages it was to write are undefined, and its rows must leave."""

    @property
    def caps(self) -> ExecutorCaps: ...

    def apply(self, diff: RowDiff) -> None:
        """Enter and leave rows. Never fails for a diff the engine may make."""
        ...

    def submit(self, plan: StepPlan) -> Ticket:
        """Enqueue one step; returns at once where the device runs asynchronously."""
        ...

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a submitted step."""
        ...

    def propose(self, rows: Sequence[int], k: int) -> Drafts:
        """k draft tokens for each row in one call; only where `caps.can_propose`."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...
