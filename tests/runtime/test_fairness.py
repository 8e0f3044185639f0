"""Fairness between keys and the lane of long prompts: bounds that hold whatever arrives."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import NullExecutor, simulated_caps
from llmc.runtime.fairness import FairShare
from llmc.runtime.order import make_order
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import Request, WaitingRequest
from llmc.runtime.turns import Turns

pytestmark = pytest.mark.pure

ROWS, LONGEST, MOST_OUTPUT = 4, 12, 8
COUNTED = st.tuples(st.integers(1, LONGEST), st.integers(1, MOST_OUTPUT))


class Served(NullExecutor):
    """Keeps every plan, and the key of every row."""

    def __init__(self, caps):
        super().__init__(caps)
        self.plans = []

    def submit(self, plan):
        self.plans.append(plan)
        return super().submit(plan)


class Shop:
    """An engine on a clock that ticks once a step; numbers requests, and counts what each key was served."""

    def __init__(self, caps=None, **options):
        options = {"max_requests": ROWS, "max_step_tokens": 16, "prefix_cache": False} | options
        self.now_s = 0.0
        self.executor = Served(simulated_caps(max_context=128, **(caps or {})))
        self.engine = Engine(self.executor, RuntimeConfig(**options), lambda: self.now_s)
        self.requests: dict[int, Request] = {}
        self.started: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.open: dict[str, set[int]] = {}

    def ask(self, key, num_prompt, max_tokens, **fields):
        number = len(self.requests)
        request = Request(
            request_id=number,
            prompt_token_ids=(number % 29,) * num_prompt,
            max_tokens=max_tokens,
            sampling=SamplingState(),
            arrival_s=self.now_s,
            key=key,
            **fields,
        )
        self.requests[number] = request
        self.open.setdefault(key, set()).add(number)
        self.engine.add_request(request)
        return number

    def step(self):
        for output in self.engine.step():
            key = self.requests[output.request_id].key
            if output.token_ids:
                self.first.setdefault(output.request_id, self.now_s)
            if output.finished is not None:
                self.open[key].discard(output.request_id)
        self.now_s += 1.0

    def waiting(self, key):
        return sum(entry.request.key == key for entry in self.engine._waiting.values())


def served_apart(fairness, order, wishes):
    """The largest difference in service, over any stretch of steps, between two keys that always wait. The
    greedy one sends three requests for each of the other's."""
    shop = Shop(order=order, fairness=fairness, max_waiting=4096)
    differences = [0.0]
    for index in range(150):
        for key, depth in (("greedy", 18), ("modest", 6)):
            while shop.waiting(key) < depth:
                shop.ask(key, *wishes[key][(index + len(shop.requests)) % len(wishes[key])])
        shop.step()
        counters = shop.engine.fairness
        differences.append(counters.served("greedy") - counters.served("modest"))
    return max(differences) - min(differences)


BOUND = 2 * (1.0 * LONGEST + 2.0 * ROWS * MOST_OUTPUT)


@settings(max_examples=15, deadline=None)
@given(
    order=st.sampled_from(["hrrn", "fcfs", "priority"]),
    wishes=st.fixed_dictionaries(
        {name: st.lists(COUNTED, min_size=1, max_size=5) for name in ("greedy", "modest")}
    ),
)
def test_two_keys_that_wait_are_served_alike(order, wishes):
    """Theorem 4.4 of the paper: at most 2 (w_p L + w_q M), however long it goes on."""
    assert served_apart(True, order, wishes) <= BOUND


def test_without_fairness_the_greedy_key_runs_away():
    assert served_apart(False, "fcfs", {"greedy": [(12, 8)], "modest": [(12, 8)]}) > 2 * BOUND


@settings(max_examples=200, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["arrive", "serve"]), st.integers(0, 12)),
        max_size=60,
    )
)
def test_counters_of_waiting_keys_stay_close(events):
    """The invariant behind the theorem (lemma 4.3): whatever arrives and whenever, the counters of keys that
    wait differ by no more than one admission and what runs may still generate."""
    share = FairShare(1.0, 2.0)
    waiting = dict.fromkeys("abc", 0)
    running: list[tuple[str, int]] = []
    for key, kind, size in events:
        if kind == "arrive":
            share.arrive(key)
            waiting[key] += 1
        elif running and size % 2:
            owner, left = running.pop(0)
            share.generate(owner, min(left, size))
        elif any(waiting.values()) and len(running) < 3:
            owner = min((each for each in "abc" if waiting[each]), key=share.served)
            waiting[owner] -= 1
            share.admit(owner, size)
            running.append((owner, 10))
        counters = [share.served(each) for each in "abc" if waiting[each]]
        assert max(counters, default=0.0) - min(counters, default=0.0) <= 12 + 2.0 * 3 * 10


def test_idle_keys_save_up_no_credit():
    share = FairShare(1.0, 2.0)
    for _ in range(3):
        share.arrive("busy")
    share.admit("busy", 100)
    share.generate("busy", 50)
    share.arrive("idle")
    assert share.served("idle") == share.served("busy") == 200.0
    share.admit("idle", 10)
    share.admit("busy", 1)
    share.leave("busy")
    assert share.served("busy") == 201.0
    share.arrive("late")
    assert share.served("late") == 201.0
    share.arrive("idle")
    assert share.served("idle") == 210.0


def queued(number, key, num_preemptions=0, priority=0, num_tokens=1, arrival_s=0.0):
    request = Request(
        request_id=number,
        prompt_token_ids=(1,),
        max_tokens=1,
        sampling=SamplingState(),
        arrival_s=arrival_s,
        key=key,
        priority=priority,
    )
    return WaitingRequest(
        request=request, token_ids=[1], num_uncached=num_tokens, num_preemptions=num_preemptions
    )


def turns_of(fairness, *waiting, order="fcfs"):
    rank = make_order(order)
    turns = Turns(waiting, lambda each: rank(each, 0.0), lambda each: False, fairness)
    numbers = []
    while (request := turns.take()) is not None:
        turns.charge(request, request.num_uncached)
        numbers.append(request.request.request_id)
    return numbers


def test_turns_go_by_what_was_served():
    share = FairShare(1.0, 2.0)
    share.generate("a", 2)
    waiting = [queued(0, "a"), queued(1, "a"), *(queued(number, "b") for number in range(2, 8))]
    assert turns_of(share, *waiting) == [2, 3, 4, 5, 0, 6, 1, 7]
    assert turns_of(None, *waiting) == list(range(8))
    assert share.served("b") == 0.0
    assert turns_of(share, *waiting[:2]) == [0, 1]


def test_priority_counts_within_a_key_and_preempted_ones_come_first():
    share = FairShare(1.0, 2.0)
    waiting = [queued(0, "a", priority=-5), queued(1, "a", priority=-9), queued(2, "b"), queued(3, "b", 1)]
    assert turns_of(share, *waiting, order="priority") == [3, 1, 2, 0]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.sampled_from("ab")), min_size=3, max_size=14),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    in_flight=st.integers(1, 2),
)
def test_no_token_of_a_step_is_left_unused(sizes, share, in_flight):
    """Work conservation: with rows and pages to spare, a step that does not compute `max_step_tokens` has
    computed all there was."""
    shop = Shop(
        {"max_in_flight": in_flight, "max_rows": 16},
        max_requests=16,
        long_prompt_tokens=20,
        long_share=share,
    )
    for size, key in sizes:
        shop.ask(key, size, 1)
    total = sum(size for size, _ in sizes)
    while shop.engine.has_work():
        shop.step()
    counts = [plan.num_tokens for plan in shop.executor.plans]
    assert counts == [16] * (total // 16) + ([total % 16] if total % 16 else [])


@settings(max_examples=20, deadline=None)
@given(data=st.data(), share=st.sampled_from([0.25, 0.5, 0.75]), order=st.sampled_from(["hrrn", "fcfs"]))
def test_short_prompts_cannot_starve_a_long_one(data, share, order):
    """However many short prompts keep coming: what has waited for `max_wait_s` starts with the next row, and
    then gets its share of every step."""
    shop = Shop(order=order, long_prompt_tokens=10, long_share=share, max_wait_s=10.0, max_waiting=4096)
    for _ in range(12):
        shop.ask("", 8, 2)
    long = shop.ask("", 100, 1)
    steps = 0
    while long not in shop.first:
        for size in data.draw(st.lists(st.integers(1, 10), max_size=6)):
            shop.ask("", size, 2)
        shop.step()
        steps += 1
        assert steps < 200
    held_rows = 16  # a row comes free within as many steps: 4 rows of at most 10 + 2 tokens each
    lane = math.ceil(share * (16 - ROWS))
    assert shop.first[long] <= 10.0 + held_rows + math.ceil(100 / lane) + 1


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_long_prompts_cannot_hold_up_short_ones(share):
    """Short prompts have what the lane leaves of each step, at once, while long ones wait or run."""
    shop = Shop(long_prompt_tokens=10, long_share=share, order="fcfs")
    for _ in range(3):
        shop.ask("", 100, 1)
    shop.step()
    for _ in range(20):
        short = shop.ask("", 5, 1)
        shop.step()
        assert short in shop.first
    without = Shop(order="fcfs")
    without.ask("", 100, 1)
    without.step()
    short = without.ask("", 5, 1)
    without.step()
    assert short not in without.first


def test_who_has_waited_long_enough_passes_everybody():
    order = make_order("priority", max_wait_s=5.0)
    fresh, old, older = queued(0, "", priority=-9, arrival_s=4.0), queued(1, "", arrival_s=1.0), queued(2, "")
    ranked = sorted([fresh, old, older], key=lambda each: order(each, 6.0))
    assert [each.request.request_id for each in ranked] == [2, 1, 0]
    ranked = sorted([old, older, fresh], key=lambda each: order(each, 4.5))
    assert ranked[0] is fresh


KEYS = st.sampled_from("abcdefgh")


@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["arrive", "admit", "leave", "serve", "end"]), KEYS), max_size=120
    )
)
def test_forgotten_counters_change_no_decision(moves):
    """Against counters that are all kept: whoever waits or runs has the same one, whatever came before."""
    forgetful, thorough = FairShare(1.0, 2.0, num_kept=0), FairShare(1.0, 2.0, num_kept=10**9)
    waiting, running = [], []
    for move, key in moves:
        for share in (forgetful, thorough):
            if move == "arrive":
                share.arrive(key)
            elif move == "admit" and key in waiting:
                share.admit(key, 3)
            elif move == "leave" and key in waiting:
                share.leave(key)
                share.end(key)
            elif move == "serve" and key in running:
                share.generate(key, 2)
            elif move == "end" and key in running:
                share.end(key)
        if move == "arrive":
            waiting.append(key)
        elif move in ("admit", "leave") and key in waiting:
            waiting.remove(key)
            running.extend([key] if move == "admit" else [])
        elif move == "end" and key in running:
            running.remove(key)
        assert [forgetful.served(key) for key in (*waiting, *running)] == [
            thorough.served(key) for key in (*waiting, *running)
        ]


def test_keys_that_come_once_leave_no_counters():
    share = FairShare(1.0, 2.0)
    for number in range(10_000):
        key = f"key-{number}"
        share.arrive(key)
        share.admit(key, 5)
        share.generate(key, 1)
        share.end(key)
    assert share.num_counters <= 65
