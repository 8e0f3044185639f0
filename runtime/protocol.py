"""The boundary between deciding and doing: what the engine hands to an executor and gets back.

Everything here is plain data over integers; no torch, no model. An executor owns the KV storage,
the permanent rows, and sampling; the engine owns blocks, order, and the life of requests.
What is made once a row and a step is a msgspec Struct, because those cost a tenth of a dataclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..spec.cache import CacheLayout

Ticket = NewType("Ticket", int)


class LogitsWanted(Enum):
    """Which rows of a segment produce logits: NONE for an unfinished prefill chunk, LAST to sample
    the next token, ALL for every position from the last known token on (speculative verification:
    1 + len(draft_ids) samples), PROMPT for the logprob of the row's known token that follows each
    position; where a PROMPT segment ends with the row's last known token, that position samples too."""

    NONE = "none"
    LAST = "last"
    ALL = "all"
    PROMPT = "prompt"


class TokenSource(Enum):
    """Where a segment's input ids come from: the plan, or the row's last sampled token, which may
    still be on the device when the plan is made. Where that sampling failed, so does the segment: its
    result is not finite, and the other rows of the step do not notice."""

    IDS = "ids"
    LAST_SAMPLED = "last_sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingState:
    """All that sampling one request depends on. `temperature` 0 is greedy.

    Noise is Philox4x32-10 keyed by (`seed`, position, vocabulary index), where the position is the one
    the sampled token will take in its sequence, so a token depends on nothing but its own request.
    `runtime.sampling` is the oracle and states the order of the filters. The tokens of
    `banned_until_min` (end and stop tokens) are masked while fewer than `min_tokens` tokens were
    generated. `logprobs` is how many top alternatives to return, None for none at all. `logit_bias` is
    pairs (token id, added bias).
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
    """A request takes a permanent row, whose block tables start empty. `token_ids` is the prompt and,
    after a preemption, what was generated behind it: `num_prompt_tokens` tells where. The executor
    appends what it samples, so that penalties and LAST_SAMPLED need nothing from the engine."""

    row: int
    request_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingState


class RowDiff(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Rows entered and left since the last diff, applied before the next `submit`.

    A row in both lists leaves first. Leaving a row forgets its tokens and block tables; the pages are
    the engine's. A step already submitted is not affected. Leaving an empty row changes nothing.
    """

    enter: tuple[RowEntry, ...] = ()
    leave: tuple[int, ...] = ()


class Segment(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`num_tokens` consecutive tokens of one row, at positions `start` ... `start + num_tokens - 1`.

    They are `token_ids` (one, the row's last sampled, when `source` is LAST_SAMPLED and `token_ids`
    is empty) followed by `draft_ids`: `num_tokens` is the sum. Drafts are proposed tokens that are
    verified: sample 0 belongs to the last token before the drafts, sample i to draft i - 1, and
    draft i is accepted when it and all before it equal the samples at their places.
    """

    row: int
    start: int
    num_tokens: int
    source: TokenSource = TokenSource.IDS
    token_ids: tuple[int, ...] = ()
    draft_ids: tuple[int, ...] = ()
    logits: LogitsWanted = LogitsWanted.LAST


class BlockChange(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One step over a ragged batch. `epoch` grows by one a step; a block freed in epoch e may be
    written again only by plans made after the result of epoch e was collected.

    `grammar_mask` is None or uint32 `[num_mask_rows, ceil(vocab / 32)]`, bit `v % 32` of word `v // 32`
    set where token v is allowed: 1 + len(draft_ids) rows for each segment, in `segments` order (a
    segment that samples nothing has one row too, which nobody reads).
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
        return sum([segment.num_tokens for segment in self.segments])

    def masks(self) -> list[NDArray[np.uint32] | None]:
        """The rows of `grammar_mask` that belong to each segment."""
        if self.grammar_mask is None:
            return [None] * len(self.segments)
        ends = np.cumsum([1 + len(segment.draft_ids) for segment in self.segments])
        return list(np.split(self.grammar_mask, ends[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token before temperature and filters, with its rank (0 = top) and the
    top alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class RowResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one segment produced. `token_ids` has 1 + `num_accepted` sampled tokens, none when the
    segment wanted no logits; `finite` is False when its logits held NaN or +inf or its masks left no
    token, and then `token_ids` is empty."""

    row: int
    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finite: bool = True


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Results in the order of the plan's segments."""

    step_id: int
    epoch: int
    rows: tuple[RowResult, ...]


class Drafts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
