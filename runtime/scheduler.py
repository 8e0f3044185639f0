"""What the next step does, as a pure decision over the requests and the page counts. It changes nothing:
the engine carries the decision out, or drops it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .blocks import BlockManager
from .fairness import FairShare
from .order import Order, is_overdue
from .prefix import PrefixHit
from .request import RunningRequest, WaitingRequest
from .turns import Turns

_NO_DRAFTS: Mapping[RunningRequest, tuple[int, ...]] = {}


class Chunk(NamedTuple):
    """`num_tokens` tokens of a request at `start`, then `draft_ids`. `samples` when it reaches the last
    known token."""

    request: RunningRequest
    start: int
    num_tokens: int
    draft_ids: tuple[int, ...]
    samples: bool


class Admission(NamedTuple):
    """A waiting request that starts, with what is cached of it and the tokens of its first chunk."""

    request: WaitingRequest
    hit: PrefixHit
    num_tokens: int


@dataclass(slots=True)
class Decision:
    """The next step. `is_starved` says that pages were missing which cannot be freed while steps are in
    flight: let those finish and plan again."""

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    admissions: list[Admission] = field(default_factory=list[Admission])
    victims: list[RunningRequest] = field(default_factory=list[RunningRequest])
    is_starved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`max_rows` requests run at a time; a step has at most `max_step_tokens` tokens. `run_ahead` allows a
    decode step for a request whose last token is still being sampled.

    Prompts with more than `long_prompt_tokens` that are not cached (0: none) share a lane: `long_share` of
    the tokens that decoding leaves of a step, and what others leave over. What has waited for `max_wait_s` is
    not held back for it.
    """

    max_rows: int
    max_step_tokens: int
    run_ahead: bool = True
    long_prompt_tokens: int = 0
    long_share: float = 0.5
    max_wait_s: float | None = None

    @property
    def has_lane(self) -> bool:
        return self.long_prompt_tokens > 0


class Scheduler:
    """Decode first, then chunks of the prompts already running, then admissions in `order` (between keys by
    `fairness`), all in one mixed batch under the token budget. Long prompts come first up to their share, and
    last beyond it. Where pages run out, the newest request is preempted."""

    def __init__(
        self, blocks: BlockManager, limits: Limits, order: Order, fairness: FairShare | None = None
    ) -> None:
        self._blocks = blocks
        self._limits = limits
        self._order = order
        self._fairness = fairness

    def plan(
        self,
        running: Sequence[RunningRequest],
        waiting: Collection[WaitingRequest],
        now_s: float,
        num_in_flight: int,
        drafts: Mapping[RunningRequest, tuple[int, ...]] = _NO_DRAFTS,
    ) -> Decision:
        """The next step. `running` is in the order of admission, oldest first."""
        draft = _Draft(self._blocks, self._limits, running, num_in_flight > 0)
        prefills = draft.decode(running)
        if drafts:
            draft.add_drafts(drafts)
        long = [each for each in prefills if self._is_long(len(each.token_ids) - each.num_cached_tokens)]
        draft.open_lane(math.ceil(self._limits.long_share * draft.budget) if self._limits.has_lane else None)
        draft.prefill(long, in_lane=True)
        draft.prefill([each for each in prefills if each not in long] if long else prefills)
        rows = self._limits.max_rows - len(running)
        admissions: list[Admission] = []
        if waiting and rows > 0 and not draft.victims and not draft.is_starved and draft.budget > 0:
            turns = Turns(
                waiting,
                lambda request: self._order(request, now_s),
                lambda request: self._may_wait(request, now_s),
                self._fairness,
            )
            idle = not running and num_in_flight == 0
            self._admit(admissions, draft, turns, long, rows, idle)
        elif long and not draft.is_starved:
            draft.extend(long)
        return draft.decision(admissions)

    def _is_long(self, num_tokens: int) -> bool:
        return self._limits.has_lane and num_tokens > self._limits.long_prompt_tokens

    def _may_wait(self, waiting: WaitingRequest, now_s: float) -> bool:
        """Whether the lane may hold it back."""
        return (
            self._is_long(waiting.num_uncached)
            and not waiting.num_preemptions
            and not is_overdue(waiting, now_s, self._limits.max_wait_s)
        )

    def _admit(
        self,
        admissions: list[Admission],
        draft: _Draft,
        turns: Turns,
        long: Sequence[RunningRequest],
        rows: int,
        idle: bool,
    ) -> None:
        """Admits while rows, budget and pages for the whole of each request's known tokens last. Long prompts
        are held to their lane until all others have had their turn."""
        kept = {each: draft.set_aside(each) for each in draft.running}
        has_pages = True
        while has_pages and len(admissions) < rows and draft.budget > 0:
            candidate = turns.take(with_long=draft.lane != 0)
            if candidate is None:
                break
            has_pages = self._start(admissions, draft, turns, candidate, idle)
        for request in long:
            draft.give_back(kept[request])
            draft.extend([request])
            kept[request] = draft.set_aside(request)
        for index, (waiting, hit, num_tokens) in enumerate(admissions if draft.lane is not None else ()):
            more = min(draft.budget, len(waiting.token_ids) - hit.num_tokens - num_tokens)
            draft.budget -= more
            admissions[index] = Admission(waiting, hit, num_tokens + more)
        draft.lane = None
        while has_pages and len(admissions) < rows and draft.budget > 0:
            candidate = turns.take()
            if candidate is None:
                break
            has_pages = self._start(admissions, draft, turns, candidate, idle)

    def _start(
        self,
        admissions: list[Admission],
        draft: _Draft,
        turns: Turns,
        candidate: WaitingRequest,
        idle: bool,
    ) -> bool:
        """Admits one request. False when its pages are missing."""
        wants_all = (
            candidate.request.prompt_logprobs
            and candidate.num_prompt_logprobs < candidate.request.num_prompt_tokens - 1
        )
        hit = self._blocks.lookup(candidate.token_ids[:1] if wants_all else candidate.token_ids)
        total = len(candidate.token_ids)
        num_uncached = total - hit.num_tokens
        is_long = self._is_long(num_uncached)
        num_tokens = min(draft.budget, num_uncached)
        if not draft.take(self._blocks.cost(hit, total + 1, self._limits.max_step_tokens)):
            if not idle or admissions:
                return False
            num_tokens = self._first_chunk_alone(draft, hit, num_tokens)
            draft.lane = None  # nothing else fits beside it, and no page is left for a larger chunk
        elif is_long and draft.lane:
            num_tokens = min(num_tokens, draft.lane)
        draft.spend(num_tokens, in_lane=is_long)
        turns.charge(candidate, num_uncached)
        admissions.append(Admission(candidate, hit, num_tokens))
        return True

    def _first_chunk_alone(self, draft: _Draft, hit: PrefixHit, num_tokens: int) -> int:
        """With nothing else running the pages of a window come back as it moves on: start with what fits."""
        available = [
            have - used
            for have, used in zip(self._blocks.available(), self._blocks.hit_cost(hit), strict=True)
        ]
        fitting = self._blocks.most_within([len(pages) for pages in hit.pages], available)
        draft.available = [0] * len(draft.available)
        return min(num_tokens, fitting - hit.num_tokens)


class _Draft:
    """A decision in the making: page counts and budget go down as chunks are added."""

    def __init__(
        self, blocks: BlockManager, limits: Limits, running: Sequence[RunningRequest], in_flight: bool
    ) -> None:
        self.blocks = blocks
        self.budget = limits.max_step_tokens
        self.lane: int | None = None
        self.run_ahead = limits.run_ahead
        self.running = running
        self.in_flight = in_flight
        self.available = blocks.available()
        self.chunks: dict[RunningRequest, Chunk] = {}
        self.victims: dict[RunningRequest, None] = {}
        self.is_starved = False
        self._newest = len(running) - 1

    def decode(self, running: Sequence[RunningRequest]) -> list[RunningRequest]:
        """One token for every request that has one to compute; returns those that have more."""
        prefills: list[RunningRequest] = []
        chunks = self.chunks
        for request in running:
            known = len(request.token_ids)
            start = request.num_scheduled
            left = known + request.num_pending - start
            if left > 1:
                prefills.append(request)
            elif left == 1 and not request.has_drafts_pending and request not in self.victims:
                if request.num_pending and not (self.run_ahead and _may_run_ahead(request)):
                    continue
                fits = start < request.blocks.capacity or self._make_room(request, start + 1)
                if fits and self.budget > 0:
                    self.budget -= 1
                    chunks[request] = Chunk(request, start, 1, (), True)
        return prefills

    def add_drafts(self, drafts: Mapping[RunningRequest, tuple[int, ...]]) -> None:
        """Drafts ride on decodes where budget and free pages allow; nothing is preempted for them."""
        for request, draft_ids in drafts.items():
            chunk = self.chunks.get(request)
            if chunk is None or request.num_pending:
                continue
            if len(draft_ids) > self.budget:
                draft_ids = draft_ids[: self.budget]
            start = chunk.start
            if not draft_ids or not self._take_pages(request, start + 1, start + 1 + len(draft_ids)):
                continue
            self.budget -= len(draft_ids)
            self.chunks[request] = Chunk(request, start, 1, draft_ids, True)

    def open_lane(self, num_tokens: int | None) -> None:
        """Long prompts have `num_tokens` of the budget before others; None when there is no lane."""
        self.lane = num_tokens

    def spend(self, num_tokens: int, in_lane: bool) -> None:
        """Takes from the budget, and from what is left of the lane."""
        self.budget -= num_tokens
        if in_lane and self.lane is not None:
            self.lane = max(0, self.lane - num_tokens)

    def prefill(self, requests: Sequence[RunningRequest], in_lane: bool = False) -> None:
        """The next chunk of each unfinished prompt, as large as budget (or lane) and pages allow."""
        for request in requests:
            allowed = min(self.budget, self.lane or 0) if in_lane else self.budget
            if allowed == 0:
                break
            if request in self.victims:
                continue
            start = request.num_scheduled
            left = len(request.token_ids) - start
            num_tokens = min(left, allowed, self._fitting(request, start) - start)
            if num_tokens <= 0:
                if not self._make_room(request, start + 1):
                    continue
                num_tokens = 1
            else:
                self._take_pages(request, start, start + num_tokens)
            self.spend(num_tokens, in_lane)
            self.chunks[request] = Chunk(request, start, num_tokens, (), num_tokens == left)

    def extend(self, requests: Sequence[RunningRequest]) -> None:
        """Larger chunks for unfinished prompts, from what is left over; nothing is preempted for them."""
        for request in requests:
            if request in self.victims:
                continue
            chunk = self.chunks.get(request)
            start = request.num_scheduled
            end = start + chunk.num_tokens if chunk is not None else start
            more = min(len(request.token_ids) - end, self.budget, self._fitting(request, end) - end)
            if more > 0 and self._take_pages(request, end, end + more):
                self.budget -= more
                end += more
                self.chunks[request] = Chunk(request, start, end - start, (), end == len(request.token_ids))

    def set_aside(self, request: RunningRequest) -> list[int]:
        """Takes the pages that a running prompt still needs, as far as they are there: newcomers do not get
        them. What was taken."""
        if request.num_scheduled >= len(request.token_ids) or request in self.victims:
            return []
        scheduled = self.chunks.get(request)
        reached = (scheduled.start + scheduled.num_tokens) if scheduled else request.num_scheduled
        whole = self.blocks.missing(request.blocks, len(request.token_ids))
        now = self.blocks.missing(request.blocks, reached)
        kept = [
            min(have, later - at_once)
            for have, later, at_once in zip(self.available, whole, now, strict=True)
        ]
        self.available = [have - pages for have, pages in zip(self.available, kept, strict=True)]
        return kept

    def give_back(self, kept: Sequence[int]) -> None:
        """Undoes `set_aside`."""
        if kept:
            self.available = [have + pages for have, pages in zip(self.available, kept, strict=True)]

    def take(self, cost: Sequence[int]) -> bool:
        """Takes pages when all of them are there."""
        if any(need > have for need, have in zip(cost, self.available, strict=True)):
            return False
        self.available = [have - need for need, have in zip(cost, self.available, strict=True)]
        return True

    def decision(self, admissions: list[Admission]) -> Decision:
        return Decision(
            chunks=list(self.chunks.values()),
            admissions=admissions,
            victims=list(self.victims),
            is_starved=self.is_starved,
        )

    def _take_pages(self, request: RunningRequest, held: int, num_tokens: int) -> bool:
        """Pages from `held` tokens (already taken) to `num_tokens`."""
        if num_tokens <= request.blocks.capacity:
            return True
        whole = self.blocks.missing(request.blocks, num_tokens)
        taken = self.blocks.missing(request.blocks, held)
        return self.take([more - less for more, less in zip(whole, taken, strict=True)])

    def _fitting(self, request: RunningRequest, held: int) -> int:
        """How many tokens fit in the pages for `held` tokens (already taken) and those available."""
        taken = self.blocks.missing(request.blocks, held)
        tables = [len(table) + pages for table, pages in zip(request.blocks.tables, taken, strict=True)]
        return self.blocks.most_within(tables, self.available)

    def _make_room(self, request: RunningRequest, num_tokens: int) -> bool:
        """Takes the pages `request` lacks, preempting from the newest on. False when it must wait, or
        was itself the newest and is preempted."""
        cost = self.blocks.missing(request.blocks, num_tokens)
        while not self.take(cost):
            if self.in_flight:
                self.is_starved = True
                return False
            victim = self._next_victim()
            if victim is None or victim is request:
                if victim is not None and len(self.victims) + 1 < len(self.running):
                    self._preempt(victim)
                return False
            self._preempt(victim)
        return True

    def _next_victim(self) -> RunningRequest | None:
        while self._newest >= 0 and self.running[self._newest] in self.victims:
            self._newest -= 1
        return self.running[self._newest] if self._newest >= 0 else None

    def _preempt(self, victim: RunningRequest) -> None:
        """What the victim holds and what this plan had given it come back."""
        chunk = self.chunks.pop(victim, None)
        freed = self.blocks.releasable(victim.blocks)
        if chunk is not None:
            size = chunk.num_tokens + len(chunk.draft_ids)
            self.budget += size
            given = self.blocks.missing(victim.blocks, chunk.start + size)
            freed = [pages + more for pages, more in zip(freed, given, strict=True)]
        self.available = [have + more for have, more in zip(self.available, freed, strict=True)]
        self.victims[victim] = None


def _may_run_ahead(request: RunningRequest) -> bool:
    """Not when the samples in flight already reach the token limit, nor when what may follow depends on
    them."""
    return request.grammar is None and (
        request.num_generated + request.num_pending < request.request.max_tokens
    )
