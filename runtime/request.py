"""The life of a request: a type per state, one table of transitions, one reason per ending. Knows no
executor and no policy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from ..spec.errors import InternalError
from .blocks import SequenceBlocks
from .grammar import Grammar, GrammarState
from .protocol import SamplingState, TokenLogprob


class FinishReason(Enum):
    """Why a request ended: a stop token or string, its token limit, its caller, a failure, its deadline."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Event(Enum):
    """What happens to a request. The five endings carry the name of their reason."""

    ADMIT = "admit"
    PREEMPT = "preempt"
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"


# What is not listed cannot happen. A preempted request may meet its stop string while it waits.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING, Event.ADMIT): State.RUNNING,
    (State.RUNNING, Event.PREEMPT): State.WAITING,
    (State.RUNNING, Event.LENGTH): State.FINISHED,
    (State.RUNNING, Event.STOP): State.FINISHED,
    (State.WAITING, Event.STOP): State.FINISHED,
    (State.RUNNING, Event.ABORT): State.FINISHED,
    (State.WAITING, Event.ABORT): State.FINISHED,
    (State.RUNNING, Event.ERROR): State.FINISHED,
    (State.WAITING, Event.ERROR): State.FINISHED,
    (State.RUNNING, Event.TIMEOUT): State.FINISHED,
    (State.WAITING, Event.TIMEOUT): State.FINISHED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the engine is asked for. Times are seconds of the engine's clock.

    At most `max_tokens` tokens are generated; one of `stop_token_ids` ends it earlier, once `min_tokens`
    (of `sampling`) are there. A lower `priority` runs first where the order looks at it. `key` names the
    client, for fairness between clients. `grammar` is the form the answer must have, None for any.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingState
    stop_token_ids: frozenset[int] = frozenset()
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0
    prompt_logprobs: bool = False
    key: str = ""
    grammar: Grammar | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(slots=True, eq=False, kw_only=True)
class WaitingRequest:
    """Queued, new or preempted. `token_ids` are the prompt and what was generated before a preemption;
    `num_uncached` estimates what admission would have to compute; `admitted_s` is when it first ran."""

    request: Request
    token_ids: list[int]
    num_uncached: int
    num_prompt_logprobs: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    admitted_s: float | None = None
    grammar: GrammarState | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class RunningRequest:
    """Holds a row and pages.

    `num_computed` tokens have their keys and values committed; `num_scheduled` counts those of steps in
    flight too. `num_pending` steps in flight will each sample a token; while one of them carries drafts
    (`has_drafts_pending`) it is not known how many.
    """

    request: Request
    row: int
    token_ids: list[int]
    blocks: SequenceBlocks
    num_computed: int
    num_scheduled: int
    num_prompt_logprobs: int = 0
    num_pending: int = 0
    has_drafts_pending: bool = False
    is_live: bool = True
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    admitted_s: float | None = None
    grammar: GrammarState | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """How a request ended. `error` is one line for reason ERROR; `num_cached_tokens` of the prompt came
    from the prefix cache at its first admission."""

    request: Request
    output_token_ids: tuple[int, ...]
    reason: FinishReason
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step has for one request: new tokens, and the ending when it came. `admitted_s` is
    when it first left the queue. Of `num_drafted` drafts verified in the step the first `num_accepted` were
    accepted."""

    request_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    admitted_s: float | None = None
    finished: FinishedRequest | None = None


def next_state(state: State, event: Event) -> State:
    """The state after `event`; InternalError when the table has no such transition."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise InternalError(
            "runtime.transition",
            f"A {state.value} request met the event {event.value}.",
            "The transition table has no such pair.",
            "Report this with the request mix that led to it.",
        )
    return after


def state_of(entry: WaitingRequest | RunningRequest | FinishedRequest) -> State:
    if isinstance(entry, WaitingRequest):
        return State.WAITING
    return State.RUNNING if isinstance(entry, RunningRequest) else State.FINISHED


def admit(waiting: WaitingRequest, row: int, blocks: SequenceBlocks, num_cached: int) -> RunningRequest:
    """Waiting to running: `num_cached` of its tokens are in `blocks` already."""
    next_state(State.WAITING, Event.ADMIT)
    return RunningRequest(
        request=waiting.request,
        row=row,
        token_ids=waiting.token_ids,
        blocks=blocks,
        num_computed=num_cached,
        num_scheduled=num_cached,
        num_prompt_logprobs=waiting.num_prompt_logprobs,
        num_preemptions=waiting.num_preemptions,
        num_cached_tokens=num_cached if waiting.num_preemptions == 0 else waiting.num_cached_tokens,
        admitted_s=waiting.admitted_s,
        grammar=waiting.grammar,
    )


def preempt(running: RunningRequest) -> WaitingRequest:
    """Running to waiting: its pages go, its tokens stay and are computed again."""
    next_state(State.RUNNING, Event.PREEMPT)
    running.is_live = False
    return WaitingRequest(
        request=running.request,
        token_ids=running.token_ids,
        num_uncached=len(running.token_ids),
        num_prompt_logprobs=running.num_prompt_logprobs,
        num_preemptions=running.num_preemptions + 1,
        num_cached_tokens=running.num_cached_tokens,
        admitted_s=running.admitted_s,
        grammar=running.grammar,
    )


def finish(
    entry: WaitingRequest | RunningRequest, reason: FinishReason, error: str | None = None
) -> FinishedRequest:
    """The ending of a request."""
    next_state(state_of(entry), Event(reason.value))
    if isinstance(entry, RunningRequest):
        entry.is_live = False
    return FinishedRequest(
        request=entry.request,
        output_token_ids=tuple(entry.token_ids[entry.request.num_prompt_tokens :]),
        reason=reason,
        error=error,
        num_preemptions=entry.num_preemptions,
        num_cached_tokens=entry.num_cached_tokens,
    )
