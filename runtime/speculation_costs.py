"""Measures what speculation costs on this machine: steps of an engine with made-up requests, before it
serves. Knows clocks; what follows from the seconds is `draft_policy`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from .config import RuntimeConfig
from .draft_policy import Curve, DraftPolicy, SpeculationCosts
from .engine import Engine
from .protocol import Executor, RowDiff, SamplingState
from .request import Request, RunningRequest
from .speculation import Speculator

# Enough points for the steps of tiled kernels to show; beyond the largest, lines go on.
COUNTS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A curve is measured for about so long; what is left out continues the line.
BUDGET_S = 0.2
REPEATS = 12
_PROMPT_TOKENS = 4
Clock = Callable[[], float]


def measure_costs(
    executor: Executor, config: RuntimeConfig, clock: Clock = time.perf_counter
) -> SpeculationCosts:
    """Seconds of decoding, verifying and drafting, each the best of a few. Leaves the rows and pages of
    `executor` as it found them."""
    bench = _Bench(executor, config, clock)
    decode, draft = bench.decode_and_draft()
    verify = bench.verify()
    if decode and verify:  # a decoding request and a verified token are the same step
        decode[1] = verify[1] = min(decode[1], verify[1])
    return SpeculationCosts(decode=_rising(decode), verify=_rising(verify), draft=_rising(draft))


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

    def decode_and_draft(self) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of steps of so many requests with a token each; and of one drafted token of theirs."""
        engine = Engine(self._executor, self._config)
        can_propose = self._executor.caps.can_propose
        decode: dict[int, float] = {}
        draft: dict[int, float] = {}
        ends_s = self._clock() + BUDGET_S
        for count in COUNTS:
            if count > engine.limits.max_requests or not self._fill(engine, count):
                break
            rows = list(range(count))
            step_s, draft_s = float("inf"), float("inf")
            for _ in range(REPEATS):
                step_s = min(step_s, self._seconds_of(engine.step))
                if can_propose:
                    seconds = self._seconds_of(lambda rows=rows: self._executor.propose(rows, 2))
                    draft_s = min(draft_s, seconds / 2)
            if engine.num_running < count:
                break
            decode[count] = step_s
            if can_propose:
                draft[count] = draft_s
            if self._clock() > ends_s:
                break
        self._finish(engine)
        return decode, draft

    def verify(self) -> dict[int, float]:
        """Seconds of steps of one request with so many tokens, all but the first of them drafts. Each round
        is over all counts that the first half of the time reaches, so that what disturbs one disturbs all."""
        fixed = _Fixed()
        most = COUNTS[-1]
        engine = Engine(self._executor, self._config, speculator=Speculator(fixed, DraftPolicy(most)))
        found: dict[int, float] = {}
        self._fill(engine, 1)
        starts_s = self._clock()
        room = min(engine.limits.max_model_len // 2, engine.limits.max_step_tokens)
        counts = [count for count in COUNTS if count <= room]
        for number in range(REPEATS):
            for count in counts:
                fixed.count = count - 1
                seconds = self._seconds_of(engine.step)
                if not engine.num_running:
                    break
                found[count] = min(seconds, found.get(count, seconds))
                if number == 0 and self._clock() - starts_s > BUDGET_S / 2:
                    break
            counts = list(found)
            if not engine.num_running or (number > 0 and self._clock() - starts_s > BUDGET_S):
                break
        self._finish(engine)
        return found

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
