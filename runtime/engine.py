"""The synchronous core: carries out the scheduler's decisions on an executor, one transaction a step, and
ends every request exactly once. Knows no text, no threads and no sockets."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from ..spec.errors import DeviceLostError, InternalError
from .admission import check_request, make_limits
from .blocks import BlockManager
from .config import RuntimeConfig
from .draft_policy import SpeculationCosts
from .fairness import FairShare
from .order import make_order
from .protocol import Executor, RowDiff, RowResult, Ticket, TokenLogprob
from .request import (
    FinishReason,
    Request,
    RequestOutput,
    RunningRequest,
    WaitingRequest,
    admit,
    finish,
    preempt,
)
from .response_cache import ResponseStats
from .scheduler import Chunk, Decision, Limits, Scheduler
from .speculation import Speculator, make_speculator
from .step import Step, build_plan, check_result, describe, row_entry

Clock = Callable[[], float]
_NO_DIFF = RowDiff()


@dataclass(slots=True)
class EngineStats:
    """Counts since the start. `accepted_at[i]` is how many drafts at place i were accepted, `drafted_at[i]`
    how many were verified; `speculation_error` is why drafting was given up, if it was. `responses` is
    counted by whoever answers requests before they get here."""

    num_steps: int = 0
    num_failed_steps: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    num_corrupted: int = 0
    num_generated_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict[FinishReason, int])
    drafted_at: list[int] = field(default_factory=list[int])
    accepted_at: list[int] = field(default_factory=list[int])
    speculation_error: str | None = None
    responses: ResponseStats = field(default_factory=ResponseStats)


class _Flight(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A submitted step."""

    ticket: Ticket
    epoch: int
    chunks: Sequence[Chunk]


class Engine:
    """Continuous batching over one executor. Not thread-safe: one thread owns it.

    A step is plan, reserve, run, then commit or roll back. Planning changes nothing; what reserving
    took goes back when the run fails, together with the requests of that step and no others. Results
    count from `collect` on: tokens, pages published to the prefix index, endings.
    """

    def __init__(
        self,
        executor: Executor,
        config: RuntimeConfig | None = None,
        clock: Clock = time.monotonic,
        *,
        costs: SpeculationCosts | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.config = config or RuntimeConfig()
        self.config.validate()
        self._executor = executor
        self._clock = clock
        caps = executor.caps
        self.blocks = BlockManager(caps.cache, caps.num_blocks, self.config.prefix_cache)
        self.limits = make_limits(self.config, caps, self.blocks.max_sequence_tokens)
        self._speculator = speculator or make_speculator(self.config, executor, costs)
        self.speculates = True  # who compares turns it off: nothing is drafted meanwhile
        self.fairness = FairShare(self.config.prompt_weight, self.config.output_weight)
        self._scheduler = Scheduler(
            self.blocks,
            Limits(
                max_rows=self.limits.max_requests,
                max_step_tokens=self.limits.max_step_tokens,
                run_ahead=self._speculator is None,
                long_prompt_tokens=self.config.long_prompt_tokens,
                long_share=self.config.long_share,
                max_wait_s=self.config.max_wait_s,
            ),
            make_order(self.config.order, self.config.max_wait_s),
            self.fairness if self.config.fairness else None,
        )
        self._max_in_flight = caps.max_in_flight
        self._waiting: dict[int, WaitingRequest] = {}
        self._running: dict[int, RunningRequest] = {}
        self._rows = list(range(self.limits.max_requests))
        self._leaving: list[int] = []
        self._in_flight: deque[_Flight] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._outputs: list[RequestOutput] = []
        self._verified: dict[tuple[int, int], int] = {}  # (drafted, accepted) of a step's requests
        self._epoch = 0
        self.stats = EngineStats()

    @property
    def executor(self) -> Executor:
        """What runs its steps."""
        return self._executor

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preempted(self) -> int:
        """Those waiting that have run before."""
        return sum(entry.num_preemptions > 0 for entry in list(self._waiting.values()))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def now_s(self) -> float:
        """The engine's clock, in which arrivals and deadlines are given."""
        return self._clock()

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return bool(self._waiting or self._running or self._in_flight or self._outputs)

    def add_request(self, request: Request) -> None:
        """Queues a request. RequestError when it can never be served as asked, or the queue is full."""
        check_request(request, self.limits, self.num_waiting)
        if request.request_id in self._waiting or request.request_id in self._running:
            raise InternalError(
                "runtime.duplicate_request",
                f"Request {request.request_id} exists already.",
                "Request numbers must be unique while a request lives.",
                "Number requests consecutively.",
            )
        token_ids = list(request.prompt_token_ids)
        cached = self.blocks.lookup(token_ids).num_tokens
        self._waiting[request.request_id] = WaitingRequest(
            request=request,
            token_ids=token_ids,
            num_uncached=len(token_ids) - cached,
            grammar=request.grammar.start() if request.grammar is not None else None,
        )
        self.fairness.arrive(request.key)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        """Ends a request now; its ending comes with the next `step`. False when it has ended already."""
        entry = self._running.get(request_id) or self._waiting.get(request_id)
        if entry is None:
            return False
        self._end(entry, reason)
        return True

    def step(self) -> list[RequestOutput]:
        """Keeps the executor busy, waits for one step, and returns what there is to tell."""
        self._expire()
        before = self._epoch
        speculator = self._speculator if self.speculates else None
        asks = speculator is not None and not speculator.is_resting and not self._in_flight
        started_s = self._clock() if asks else None
        while len(self._in_flight) < self._max_in_flight and self._launch():
            pass
        if self._in_flight:
            chunks, is_alone = self._in_flight[0].chunks, len(self._in_flight) == 1
            self._collect()
            if started_s is not None and is_alone and self._speculator is not None:
                self._speculator.observe_step(chunks, self._clock() - started_s)
        elif not self._outputs and self._epoch == before and (self._waiting or self._running):
            raise InternalError(
                "runtime.stuck",
                f"{len(self._waiting)} waiting and {len(self._running)} running requests cannot move on.",
                f"No step could be planned with {self.blocks.available()} pages available.",
                "Report this with the request mix that led to it.",
            )
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Aborts what lives, waits for steps in flight and closes the executor. Idempotent."""
        for entry in (*self._running.values(), *self._waiting.values()):
            self._end(entry, FinishReason.ABORT)
        while self._in_flight:
            self._collect()
        self._executor.close()

    def _launch(self) -> bool:
        """Plans and submits one step. False when there is nothing to submit now."""
        try:
            drafts = self._drafts()
        except Exception as error:  # noqa: BLE001 - a failing draft model must not fail any request
            self.stats.speculation_error = describe(error)
            self._speculator = None
            drafts = {}
        running = list(self._running.values())
        decision = self._scheduler.plan(
            running, self._waiting.values(), self._clock(), len(self._in_flight), drafts
        )
        for victim in decision.victims:
            self._preempt(victim)
        if decision.is_starved:
            return False
        if not decision.chunks and not decision.admissions:
            if decision.victims:
                return self._launch()
            self._flush_rows()
            return False
        step = self._reserve(decision)
        try:
            if step.diff is not _NO_DIFF:
                self._executor.apply(step.diff)
                self._leaving.clear()
            ticket = self._executor.submit(step.plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this step alone
            self._fail(step.chunks, error)
            return False
        self._commit_launch(step, ticket)
        return True

    def _drafts(self) -> dict[RunningRequest, tuple[int, ...]]:
        if self._speculator is None or not self.speculates:
            return {}
        if self._speculator.is_resting:
            return self._speculator.propose(())
        ready = [
            request
            for request in self._running.values()
            if not request.num_pending and len(request.token_ids) - request.num_scheduled == 1
        ]
        return self._speculator.propose(ready)

    def _reserve(self, decision: Decision) -> Step:
        """Takes rows and pages for the decision. Cached prefixes are held before any page is handed out,
        since handing out may evict."""
        entered: list[RunningRequest] = []
        chunks = decision.chunks
        for waiting, hit, num_tokens in decision.admissions:
            blocks = self.blocks.open(hit, len(waiting.token_ids))
            request = admit(waiting, heapq.heappop(self._rows), blocks, hit.num_tokens)
            if request.admitted_s is None:
                request.admitted_s = self._clock()
                self.fairness.admit(request.request.key, len(waiting.token_ids) - hit.num_tokens)
            del self._waiting[request.request.request_id]
            self._running[request.request.request_id] = request
            entered.append(request)
            end = hit.num_tokens + num_tokens
            chunks.append(Chunk(request, hit.num_tokens, num_tokens, (), end == len(request.token_ids)))
        diff = _NO_DIFF
        if entered or self._leaving:
            diff = RowDiff(enter=tuple(map(row_entry, entered)), leave=tuple(self._leaving))
        plan = build_plan(self._epoch + 1, chunks, self.blocks, self.limits.vocab_size)
        return Step(plan=plan, diff=diff, chunks=chunks)

    def _commit_launch(self, step: Step, ticket: Ticket) -> None:
        self._epoch = step.plan.epoch
        self.blocks.begin_epoch(self._epoch)
        self._in_flight.append(_Flight(ticket=ticket, epoch=self._epoch, chunks=step.chunks))
        for request, start, num_tokens, draft_ids, samples in step.chunks:
            request.num_scheduled = start + num_tokens + len(draft_ids)
            if samples:
                request.num_pending += 1
                request.has_drafts_pending = bool(draft_ids)

    def _collect(self) -> None:
        """Waits for the oldest step and commits its results."""
        flight = self._in_flight.popleft()
        try:
            result = self._executor.collect(flight.ticket)
            check_result(flight.chunks, result)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this step alone
            self.blocks.retire_epoch(flight.epoch)
            self._fail(flight.chunks, error)
            return
        self.blocks.retire_epoch(flight.epoch)
        self.stats.num_steps += 1
        for chunk, row in zip(flight.chunks, result.rows, strict=True):
            if chunk.request.is_live:
                self._accept(chunk, row)
        if self._verified:
            self._count_drafts()

    def _accept(self, chunk: Chunk, row: RowResult) -> None:
        """Commits one row's result."""
        request, start, num_tokens, draft_ids, samples = chunk
        end = start + num_tokens + row.num_accepted
        self.stats.num_computed_tokens += num_tokens
        if samples:
            request.num_pending -= 1
        if not row.finite:
            self.stats.num_corrupted += 1
            error = request.grammar.error if request.grammar is not None else None
            self._end(
                request, FinishReason.ERROR, error or "The model produced logits that cannot be sampled."
            )
            return
        if draft_ids:
            request.has_drafts_pending = False
            request.num_scheduled = end
            counted = len(draft_ids), row.num_accepted
            self._verified[counted] = self._verified.get(counted, 0) + 1
        token_ids, reason = self._append(request, row.token_ids) if samples else ((), None)
        self.fairness.generate(request.request.key, len(token_ids))
        request.num_computed = min(end, len(request.token_ids))
        self.blocks.commit(request.blocks, request.token_ids, request.num_computed)
        prompt_logprobs = self._prompt_logprobs(chunk, row) if row.prompt_logprobs else ()
        if reason is not None:
            self._end(request, reason, None, token_ids, row, prompt_logprobs, len(draft_ids))
        elif token_ids or prompt_logprobs:
            self._outputs.append(
                RequestOutput(
                    request_id=request.request.request_id,
                    token_ids=token_ids,
                    logprobs=row.logprobs,
                    prompt_logprobs=prompt_logprobs,
                    num_cached_tokens=request.num_cached_tokens,
                    num_drafted=len(draft_ids),
                    num_accepted=row.num_accepted,
                    admitted_s=request.admitted_s,
                )
            )

    def _append(
        self, request: RunningRequest, token_ids: tuple[int, ...]
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Appends samples up to the first that ends the request: what was kept, and the reason."""
        spec = request.request
        left = spec.max_tokens - request.num_generated
        grammar = request.grammar
        for index, token_id in enumerate(token_ids):
            request.token_ids.append(token_id)
            if grammar is not None:
                grammar.accept(token_id)
            if token_id in spec.stop_token_ids or (grammar is not None and grammar.is_over):
                return token_ids[: index + 1], FinishReason.STOP
            if index + 1 == left:
                return token_ids[: index + 1], FinishReason.LENGTH
        return token_ids, None

    def _prompt_logprobs(self, chunk: Chunk, row: RowResult) -> tuple[TokenLogprob, ...]:
        """Those not told before: after a preemption the start of the prompt comes again."""
        request = chunk.request
        first = request.num_prompt_logprobs - chunk.start
        last = request.request.num_prompt_tokens - 1 - chunk.start
        fresh = row.prompt_logprobs[max(0, first) : max(0, last)]
        request.num_prompt_logprobs += len(fresh)
        return fresh

    def _count_drafts(self) -> None:
        """Tells of one step's drafts, of those requests together that had and accepted as many."""
        stats = self.stats
        for (num_drafted, num_accepted), times in self._verified.items():
            if self._speculator is not None:
                self._speculator.observe(num_drafted, num_accepted, times)
            while len(stats.drafted_at) < num_drafted:
                stats.drafted_at.append(0)
                stats.accepted_at.append(0)
            for place in range(num_drafted):
                stats.drafted_at[place] += times
            for place in range(num_accepted):
                stats.accepted_at[place] += times
        self._verified.clear()

    def _preempt(self, request: RunningRequest) -> None:
        """Back to the queue: the pages go, the tokens stay."""
        self._release(request)
        waiting = preempt(request)
        self._waiting[request.request.request_id] = waiting
        self.stats.num_preemptions += 1

    def _release(self, request: RunningRequest) -> None:
        """Gives row and pages back."""
        request_id = request.request.request_id
        del self._running[request_id]
        self.blocks.close(request.blocks)
        heapq.heappush(self._rows, request.row)
        self._leaving.append(request.row)
        if self._speculator is not None:
            self._speculator.forget(request_id)

    def _end(
        self,
        entry: WaitingRequest | RunningRequest,
        reason: FinishReason,
        error: str | None = None,
        token_ids: tuple[int, ...] = (),
        row: RowResult | None = None,
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
        num_drafted: int = 0,
    ) -> None:
        """The one place where a request ends."""
        finished = finish(entry, reason, error)
        if isinstance(entry, RunningRequest):
            self._release(entry)
        else:
            del self._waiting[entry.request.request_id]
            if entry.admitted_s is None:
                self.fairness.leave(entry.request.key)
        self.fairness.end(entry.request.key)
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        self.stats.num_generated_tokens += len(finished.output_token_ids)
        self._outputs.append(
            RequestOutput(
                request_id=entry.request.request_id,
                token_ids=token_ids,
                logprobs=row.logprobs[: len(token_ids)] if row is not None else (),
                prompt_logprobs=prompt_logprobs,
                num_cached_tokens=entry.num_cached_tokens,
                num_drafted=num_drafted,
                num_accepted=row.num_accepted if row is not None else 0,
                admitted_s=entry.admitted_s,
                finished=finished,
            )
        )

    def _fail(self, chunks: Sequence[Chunk], error: Exception) -> None:
        """Rolls a step back: its own requests end, nothing else changes. Raises the error where no step can
        run after it."""
        self.stats.num_failed_steps += 1
        for chunk in chunks:
            if chunk.request.is_live:
                self._end(chunk.request, FinishReason.ERROR, describe(error))
        if isinstance(error, DeviceLostError):
            raise error

    def _expire(self) -> None:
        """Ends what is past its deadline."""
        now_s = self._clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            entry = self._running.get(request_id) or self._waiting.get(request_id)
            if entry is not None and entry.request.deadline_s == deadline_s:
                self._end(entry, FinishReason.TIMEOUT)

    def _flush_rows(self) -> None:
        """Tells an executor with nothing to do which rows it can forget."""
        if self._leaving and not self._in_flight:
            self._executor.apply(RowDiff(leave=tuple(self._leaving)))
            self._leaving.clear()
