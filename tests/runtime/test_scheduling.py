"""Decisions by themselves: who goes first, what fits, who gives way; and the engine's answers to failures."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from llmc.runtime.admission import make_limits
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import Faults, NullExecutor, SimulatedExecutor, simulated_caps
from llmc.runtime.order import fcfs, hrrn, make_order, priority
from llmc.runtime.protocol import LogitsWanted, SamplingState
from llmc.runtime.request import FinishReason, WaitingRequest
from llmc.runtime.speculation import NgramIndex
from llmc.spec.errors import InternalError, RequestError, UsageError

pytestmark = pytest.mark.pure


class Watched(SimulatedExecutor):
    """Keeps every plan."""

    def __init__(self, caps, faults=None):
        super().__init__(caps, faults)
        self.plans, self.diffs = [], []

    def apply(self, diff):
        self.diffs.append(diff)
        super().apply(diff)

    def submit(self, plan):
        self.plans.append(plan)
        return super().submit(plan)


def watched(config=None, faults=None, clock=lambda: 0.0, **caps):
    executor = Watched(simulated_caps(**caps), faults)
    return Engine(executor, config or RuntimeConfig(max_requests=4, max_step_tokens=8), clock), executor


def shape(plan):
    return [(segment.row, segment.start, segment.num_tokens) for segment in plan.segments]


def test_decodes_come_before_prompts_and_budget_is_shared(request_of):
    engine, executor = watched()
    engine.add_request(request_of(0, range(5), 6))
    engine.step()
    engine.add_request(request_of(1, range(9, 29), 4))
    for _ in range(4):
        engine.step()
    assert [shape(plan) for plan in executor.plans] == [
        [(0, 0, 5)],
        [(0, 5, 1), (1, 0, 7)],
        [(0, 6, 1), (1, 7, 7)],
        [(0, 7, 1), (1, 14, 6)],
        [(0, 8, 1), (1, 20, 1)],
    ]
    wanted = [[segment.logits for segment in plan.segments] for plan in executor.plans]
    assert wanted[1] == [LogitsWanted.LAST, LogitsWanted.NONE]
    assert wanted[3] == [LogitsWanted.LAST, LogitsWanted.LAST]


def test_newest_is_preempted_and_returns_before_new_ones(request_of, drained):
    engine, executor = watched(
        RuntimeConfig(max_requests=3, max_step_tokens=32, order="fcfs", prefix_cache=False),
        groups=(("full", 0, 4, 8),),
        max_context=32,
    )
    for number in range(3):
        engine.add_request(request_of(number, range(number, number + 7), 20, arrival_s=float(number)))
    order = []
    while engine.has_work():
        order += [output.request_id for output in engine.step() if output.finished]
    assert order == [0, 1, 2]
    assert engine.stats.num_preemptions > 0
    entries = [entry.request_id for diff in executor.diffs for entry in diff.enter]
    assert entries.count(0) == 1
    assert entries.count(1) > 1
    longest = max((entry for diff in executor.diffs for entry in diff.enter), key=lambda e: len(e.token_ids))
    assert len(longest.token_ids) > longest.num_prompt_tokens == 7


def test_admission_waits_for_pages_of_the_whole_prompt(request_of):
    engine, _ = watched(groups=(("full", 0, 4, 8),), max_context=32, max_tokens=8)
    engine.add_request(request_of(0, range(15), 4))
    engine.add_request(request_of(1, range(1, 18), 4))
    engine.step()
    engine.step()
    assert engine.num_running == 1
    assert engine.blocks.used() == [4]


def queued(number, arrival_s, num_uncached, level=0, num_preemptions=0):
    from llmc.runtime.request import Request

    request = Request(
        request_id=number,
        prompt_token_ids=(1,),
        max_tokens=1,
        sampling=SamplingState(),
        arrival_s=arrival_s,
        priority=level,
    )
    return WaitingRequest(
        request=request, token_ids=[1], num_uncached=num_uncached, num_preemptions=num_preemptions
    )


def ranked(order, now_s, *requests):
    return [each.request.request_id for each in sorted(requests, key=lambda each: order(each, now_s))]


def test_orders():
    long_first = queued(0, 0.0, 1000)
    short_later = queued(1, 9.0, 10)
    assert ranked(fcfs, 10.0, short_later, long_first) == [0, 1]
    assert ranked(hrrn, 10.0, long_first, short_later) == [1, 0]
    assert ranked(priority, 10.0, queued(0, 0.0, 1, 5), queued(1, 3.0, 1, 2), queued(2, 1.0, 1, 2)) == [
        2,
        1,
        0,
    ]
    again = queued(7, 5.0, 5000, 9, num_preemptions=1)
    assert ranked(make_order("hrrn"), 10.0, long_first, short_later, again)[0] == 7
    assert ranked(make_order("priority"), 10.0, long_first, again)[0] == 0


def test_no_request_starves_under_hrrn():
    """A long request passes any later short one once it has waited long enough, however many come."""
    long = queued(0, 0.0, 10_000)
    for now_s in range(1, 5000):
        fresh = queued(1, now_s - 0.4, 10)
        if ranked(hrrn, float(now_s), long, fresh)[0] == 0:
            break
    assert now_s <= 0.4 * 10_000 / 10 + 1


def test_a_failing_step_fails_its_own_requests_only(request_of, drained):
    failures = []

    def on_collect(plan):
        if any(segment.num_tokens == 6 for segment in plan.segments) and not failures:
            failures.append(plan)
            raise MemoryError("device is out of memory")

    engine, _ = watched(RuntimeConfig(max_requests=1, max_step_tokens=8), Faults(on_collect=on_collect))
    engine.add_request(request_of(0, range(4)))
    engine.add_request(request_of(1, range(1, 7)))
    engine.add_request(request_of(2, range(3)))
    ended = drained(engine)
    assert [ended[number].reason is FinishReason.ERROR for number in range(3)] == [False, True, False]
    assert ended[1].error == "MemoryError: device is out of memory"
    assert engine.stats.num_failed_steps == 1


def test_a_result_that_does_not_fit_is_refused(request_of, drained):
    class Babbling(NullExecutor):
        def collect(self, ticket):
            result = super().collect(ticket)
            return msgspec.structs.replace(result, rows=result.rows[:-1])

    engine = Engine(Babbling(simulated_caps()))
    engine.add_request(request_of(0, range(4)))
    assert "results that do not fit its plan" in drained(engine)[0].error


def test_a_failing_draft_model_costs_speed_only(request_of, drained):
    class Broken(SimulatedExecutor):
        def propose(self, rows, k):
            raise RuntimeError("no draft")

    engine = Engine(Broken(simulated_caps(can_propose=True)), RuntimeConfig(speculation="draft"))
    plain = Engine(SimulatedExecutor(simulated_caps()))
    for each in (engine, plain):
        each.add_request(request_of(0, range(4)))
    assert drained(engine)[0].output_token_ids == drained(plain)[0].output_token_ids
    assert engine.stats.speculation_error == "RuntimeError: no draft"


def test_run_ahead_keeps_the_executor_busy(request_of, drained):
    engine, executor = watched(max_in_flight=2)
    engine.add_request(request_of(0, range(4), 10))
    engine.step()
    assert len(executor.plans) == 2
    drained(engine)
    assert [plan.epoch for plan in executor.plans] == list(range(1, 11))
    assert sum(plan.num_tokens for plan in executor.plans) == 4 + 9


def test_what_cannot_be_served_is_refused_at_once(request_of):
    engine, _ = watched(RuntimeConfig(max_requests=4, max_step_tokens=8, max_waiting=1))
    with pytest.raises(RequestError, match="The prompt has 128 tokens, and the context is 128 tokens"):
        engine.add_request(request_of(0, [1] * 128, 1))
    engine.add_request(request_of(0, [1]))
    with pytest.raises(RequestError, match="1 requests are waiting already"):
        engine.add_request(request_of(1, [1]))
    with pytest.raises(InternalError, match="Request 0 exists already"):
        Engine.add_request(_room(engine), request_of(0, [1]))


def _room(engine):
    engine.limits = dataclasses.replace(engine.limits, max_waiting=9)
    return engine


def test_limits_say_what_bounds_them():
    caps = simulated_caps(max_context=128, max_rows=8, max_tokens=64)
    limits = make_limits(RuntimeConfig(), caps, 40)
    assert (limits.max_model_len, limits.max_requests, limits.max_step_tokens) == (40, 8, 64)
    with pytest.raises(
        UsageError, match=r"100 tokens was asked for, and at most 40 fit\. The cache holds no more"
    ):
        make_limits(RuntimeConfig(max_model_len=100), caps, 40)
    with pytest.raises(UsageError, match=r"at most 128 fit\. The model holds no more"):
        make_limits(RuntimeConfig(max_model_len=200), caps, None)
    with pytest.raises(UsageError, match="has no draft model"):
        Engine(NullExecutor(caps), RuntimeConfig(speculation="draft"))


def test_closing_twice_aborts_once(request_of):
    engine, _ = watched(max_in_flight=3)
    engine.add_request(request_of(0, range(4)))
    engine.step()
    engine.close()
    engine.close()
    outputs = engine.step()
    assert [output.finished.reason for output in outputs if output.finished] == [FinishReason.ABORT]
    assert engine.blocks.used() == [0]


@pytest.mark.parametrize(
    ("tokens", "k", "draft"),
    [
        ([1, 2, 3, 9, 1, 2], 2, (3, 9)),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, (4, 1)),
        ([5, 6, 5, 6], 5, (5, 6, 5, 6, 5)),
        ([7, 7, 7], 3, (7, 7, 7)),
        ([1, 2, 3, 4], 3, ()),
        ([1], 3, ()),
    ],
)
def test_prompt_lookup(tokens, k, draft):
    assert NgramIndex(2, 3).propose(tokens, k) == draft
    grown = NgramIndex(2, 3)
    for end in range(1, len(tokens)):
        grown.propose(tokens[:end], k)
    assert grown.propose(tokens, k) == draft
