"""Measures what speculation costs on this machine: steps of an engine with made-up requests, before it
serves. Knows clocks; what follows from the seconds is `draft_policy`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from .config import RuntimeConfig
from .draft_policy import Curve, DraftPolicy, SpeculationCosts
from .engine import Engine
from .protocol import Executor, RowDiff, SamplingState
from .request import Request, RunningRequest
from .speculation import DraftProposer, Speculator

# Enough points for the steps of tiled kernels to show; beyond the largest, lines go on.
COUNTS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A curve is measured for about so long; what is left out continues the line.
BUDGET_S = 0.2
# The least of so many counts: of fewer where a quarter of that time is over, for more than a few requests,
# and where requests are so short that they would end.
REPEATS, FEWER_REPEATS, FEW, SHORT = 36, 12, 2, 288
# Steps of so many tokens are measured most often: a request and a few drafts.
MOST_SMALL = 8
_PROMPT_TOKENS = 4
Clock = Callable[[], float]


def measure_costs(
    executor: Executor, config: RuntimeConfig, clock: Clock = time.perf_counter
) -> SpeculationCosts:
    """Seconds of decoding, verifying and drafting, each the best of a few. Leaves the rows and pages of
    `executor` as it found them."""
    bench = _Bench(executor, config, clock)
    decode = bench.decode()
    draft, draft_call = bench.draft() if executor.caps.can_propose else ({}, {})
    verify = bench.verify()
    if draft and 4 in verify:
        # Parts that were timed apart, each with its code and data at hand, take less than they do in turn,
        # and more than drafts that are drawn while the last step is accounted for.
        beyond = {count: bench.draft_and_verify(count) - verify[count + 1] for count in (1, 3)}
        if beyond[3] < float("inf"):
            draft[1] = max(0.0, beyond[3] - beyond[1]) / 2
            draft_call[1] = max(0.0, beyond[1] - draft[1])
    if 1 in decode and 1 in verify:
        # A decoding request and a verified token are the same step: where they differ, other work slowed one
        # of the two measurements, all of it, and the counts of each are right among themselves.
        slower = decode[1] / verify[1]
        decode = {count: seconds / slower for count, seconds in decode.items()}
    return SpeculationCosts(
        decode=_rising(decode),
        verify=_rising(verify),
        draft=_rising(draft),
        draft_call=_rising(draft_call),
    )


def _rising(seconds: dict[int, float]) -> Curve:
    """The curve through `seconds` by count. More work never takes less time: what took longer than some
    larger count was disturbed, and counts as that."""
    points: list[tuple[int, float]] = []
    least = float("inf")
    for count in sorted(seconds, reverse=True):
        least = min(least, seconds[count])
        points.append((count, least))
    return Curve(tuple(reversed(points)))


class _Fixed:
    """Proposes the same token `count` times: what matters is that it is computed."""

    is_free = True

    def __init__(self) -> None:
        self.count = 0

    def propose(self, requests: Sequence[RunningRequest], k: int) -> dict[RunningRequest, tuple[int, ...]]:
        del k
        return dict.fromkeys(requests, (0,) * self.count) if self.count else {}

    def forget(self, request_id: int) -> None:
        """Nothing is remembered."""


class _Bench:
    """Runs made-up requests through engines over one executor."""

    def __init__(self, executor: Executor, config: RuntimeConfig, clock: Clock) -> None:
        self._executor = executor
        self._config = replace(config, speculation="none", prefix_cache=False)
        self._clock = clock

    def decode(self) -> dict[int, float]:
        """Seconds of steps of so many requests with a token each."""
        engine = Engine(self._executor, self._config)
        found: dict[int, float] = {}
        for count in self._filled(engine):
            seconds = min(self._seconds_of(engine.step) for _ in self._rounds(engine, count))
            if engine.num_running == count:
                found[count] = seconds
        self._finish(engine)
        return found

    def draft(self) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of one drafted token of so many requests, and of a call beyond its tokens. Two steps lie
        between two calls, because the draft model has two tokens to read where its draft was accepted."""
        engine = Engine(self._executor, self._config)
        draft: dict[int, float] = {}
        call: dict[int, float] = {}
        for count in self._filled(engine):
            rows = list(range(count))
            best = {1: float("inf"), 3: float("inf")}
            for number in self._rounds(engine, count):
                engine.step()
                engine.step()
                if engine.num_running < count:
                    break
                drawn = 3 if number % 2 else 1
                propose = partial(self._executor.propose, rows, drawn)
                best[drawn] = min(best[drawn], self._seconds_of(propose))
            if best[3] < float("inf"):
                draft[count] = max(0.0, best[3] - best[1]) / 2
                call[count] = max(0.0, best[1] - draft[count])
        self._finish(engine)
        return draft, call

    def draft_and_verify(self, count: int) -> float:
        """Seconds of a step of one request that drafts `count` tokens and verifies them."""
        speculator = Speculator(DraftProposer(self._executor), DraftPolicy(count))
        engine = Engine(self._executor, self._config, speculator=speculator)
        least_s = float("inf")
        if self._fill(engine, 1):
            for _ in self._rounds(engine, 1):
                seconds = self._seconds_of(engine.step)
                if not engine.num_running:
                    break
                least_s = min(least_s, seconds)
        self._finish(engine)
        return least_s

    def _rounds(self, engine: Engine, num_requests: int) -> Iterator[int]:
        """Numbers, as many as what so many requests take is timed."""
        ends_s = self._clock() + BUDGET_S / 4
        is_long = engine.limits.max_model_len >= SHORT
        for number in range(REPEATS if num_requests <= FEW and is_long else FEWER_REPEATS):
            if number >= FEWER_REPEATS and self._clock() > ends_s:
                return
            yield number

    def _filled(self, engine: Engine) -> Iterator[int]:
        """Each count of requests in turn, while so many decode and time is left."""
        ends_s = self._clock() + BUDGET_S
        for count in COUNTS:
            if count > engine.limits.max_requests or not self._fill(engine, count):
                break
            yield count
            if engine.num_running < count or self._clock() > ends_s:
                break

    def verify(self) -> dict[int, float]:
        """Seconds of steps of one request with so many tokens, all but the first of them drafts. Small
        counts, which decide most, get half of the time; each round is over all counts that the first one
        reaches, so that what disturbs one disturbs all."""
        fixed = _Fixed()
        engine = Engine(self._executor, self._config, speculator=Speculator(fixed, DraftPolicy(COUNTS[-1])))
        room = min(engine.limits.max_model_len // 2, engine.limits.max_step_tokens)
        counts = [count for count in COUNTS if count <= room]
        found: dict[int, float] = {}
        for some in ([c for c in counts if c <= MOST_SMALL], [c for c in counts if c > MOST_SMALL]):
            self._time_rounds(engine, fixed, some, found)
        self._finish(engine)
        return found

    def _time_rounds(self, engine: Engine, fixed: _Fixed, counts: list[int], found: dict[int, float]) -> None:
        """Enters in `found` the best seconds of rounds over `counts`, for half of the time. Each round is a
        new request, since a step takes longer the more its request has in the cache."""
        starts_s = self._clock()
        for number in range(REPEATS):
            self._restart(engine, fixed)
            reached: list[int] = []
            for count in counts:
                fixed.count = count - 1
                seconds = self._seconds_of(engine.step)
                if not engine.num_running:
                    break
                reached.append(count)
                found[count] = min(seconds, found.get(count, seconds))
                if number == 0 and self._clock() - starts_s > BUDGET_S / 4:
                    break
            counts = reached
            if not counts or self._clock() - starts_s > BUDGET_S / 2:
                break

    def _restart(self, engine: Engine, fixed: _Fixed) -> None:
        """One request that decodes, with nothing but its prompt in the cache."""
        fixed.count = 0
        if engine.num_running:
            engine.abort(0)
        while engine.has_work():
            engine.step()
        self._fill(engine, 1)

    def _fill(self, engine: Engine, count: int) -> bool:
        """Requests until `count` decode. False when they do not fit."""
        room = engine.limits.max_model_len
        prompt = min(_PROMPT_TOKENS, room - 1)
        for number in range(engine.num_running, count):
            engine.add_request(
                Request(
                    request_id=number,
                    prompt_token_ids=(0,) * prompt,
                    max_tokens=room - prompt,
                    sampling=SamplingState(temperature=1.0, seed=number),
                )
            )
        while engine.num_waiting and not engine.stats.num_preemptions:
            before = engine.num_running
            engine.step()
            if engine.num_running == before:
                break
        return engine.num_running == count

    def _seconds_of(self, run: Callable[[], object]) -> float:
        started = self._clock()
        run()
        return self._clock() - started

    def _finish(self, engine: Engine) -> None:
        """Ends all requests without closing the executor, and frees their rows."""
        for number in range(engine.limits.max_requests):
            engine.abort(number)
        while engine.has_work():
            engine.step()
        self._executor.apply(RowDiff(leave=tuple(range(engine.limits.max_requests))))
