"""What the next step does, as a pure decision over the requests and the page counts. It changes nothing:
the engine carries the decision out, or drops it."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .blocks import BlockManager
from .order import Order
from .prefix import PrefixHit
from .request import RunningRequest, WaitingRequest

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
    decode step for a request whose last token is still being sampled."""

    max_rows: int
    max_step_tokens: int
    run_ahead: bool = True


class Scheduler:
    """Decode first, then chunks of the prompts already running, then admissions in `order`, all in one
    mixed batch under the token budget. Where pages run out, the newest request is preempted."""

    def __init__(self, blocks: BlockManager, limits: Limits, order: Order) -> None:
        self._blocks = blocks
        self._limits = limits
        self._order = order

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
        draft.prefill(prefills)
        decision = draft.decision()
        rows = self._limits.max_rows - len(running)
        if waiting and rows > 0 and not decision.victims and not decision.is_starved and draft.budget > 0:
            idle = not running and num_in_flight == 0
            self._admit(decision, draft, waiting, now_s, rows, idle)
        return decision

    def _admit(
        self,
        decision: Decision,
        draft: _Draft,
        waiting: Collection[WaitingRequest],
        now_s: float,
        rows: int,
        idle: bool,
    ) -> None:
        """Admits while rows, budget and pages for the whole of each request's known tokens last."""
        self._set_aside(draft)
        best = heapq.nsmallest(
            min(rows, draft.budget), waiting, key=lambda request: self._order(request, now_s)
        )
        for candidate in best:
            if draft.budget == 0:
                break
            wants_all = (
                candidate.request.prompt_logprobs
                and candidate.num_prompt_logprobs < candidate.request.num_prompt_tokens - 1
            )
            hit = self._blocks.lookup(candidate.token_ids[:1] if wants_all else candidate.token_ids)
            total = len(candidate.token_ids)
            num_tokens = min(draft.budget, total - hit.num_tokens)
            cost = self._blocks.cost(hit, total + 1, self._limits.max_step_tokens)
            if not draft.take(cost):
                if not idle or decision.admissions:
                    break
                num_tokens = self._first_chunk_alone(draft, hit, num_tokens)
            draft.budget -= num_tokens
            decision.admissions.append(Admission(candidate, hit, num_tokens))

    def _set_aside(self, draft: _Draft) -> None:
        """Pages that running prompts still need are not given to newcomers."""
        for request in draft.running:
            if request.num_scheduled < len(request.token_ids) and request not in draft.victims:
                scheduled = draft.chunks.get(request)
                reached = (scheduled.start + scheduled.num_tokens) if scheduled else request.num_scheduled
                whole = self._blocks.missing(request.blocks, len(request.token_ids))
                now = self._blocks.missing(request.blocks, reached)
                draft.available = [
                    max(0, have - (later - at_once))
                    for have, later, at_once in zip(draft.available, whole, now, strict=True)
                ]

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
            draft_ids = draft_ids[: self.budget]
            end = chunk.start + 1
            if not draft_ids or not self._take_pages(request, end, end + len(draft_ids)):
                continue
            self.budget -= len(draft_ids)
            self.chunks[request] = chunk._replace(draft_ids=draft_ids)

    def prefill(self, requests: Sequence[RunningRequest]) -> None:
        """The next chunk of each unfinished prompt, as large as budget and pages allow."""
        for request in requests:
            if self.budget == 0:
                break
            if request in self.victims:
                continue
            start = request.num_scheduled
            left = len(request.token_ids) - start
            num_tokens = min(left, self.budget, self._fitting(request) - start)
            if num_tokens <= 0:
                if not self._make_room(request, start + 1):
                    continue
                num_tokens = 1
            else:
                self._take_pages(request, start, start + num_tokens)
            self.budget -= num_tokens
            self.chunks[request] = Chunk(request, start, num_tokens, (), num_tokens == left)

    def take(self, cost: Sequence[int]) -> bool:
        """Takes pages when all of them are there."""
        if any(need > have for need, have in zip(cost, self.available, strict=True)):
            return False
        self.available = [have - need for need, have in zip(cost, self.available, strict=True)]
        return True

    def decision(self) -> Decision:
        return Decision(
            chunks=list(self.chunks.values()), victims=list(self.victims), is_starved=self.is_starved
        )

    def _take_pages(self, request: RunningRequest, held: int, num_tokens: int) -> bool:
        """Pages from `held` tokens (already taken) to `num_tokens`."""
        if num_tokens <= request.blocks.capacity:
            return True
        whole = self.blocks.missing(request.blocks, num_tokens)
        taken = self.blocks.missing(request.blocks, held)
        return self.take([more - less for more, less in zip(whole, taken, strict=True)])

    def _fitting(self, request: RunningRequest) -> int:
        return self.blocks.most_within([len(table) for table in request.blocks.tables], self.available)

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
