"""When drafting pays: arithmetic over costs and acceptance, without an engine."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime import speculation_costs
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_policy import (
    MARGIN,
    PLAIN_EVERY,
    PLAIN_FIRST,
    PLAIN_RUN,
    PROBE_PATIENCE,
    PROBE_RUN,
    PROBE_STEPS,
    Acceptance,
    Curve,
    DraftPolicy,
    SpeculationCosts,
)
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import Request, RunningRequest
from llmc.runtime.speculation import LOOK_EACH_S, LOOK_S, MOST_REST, NgramIndex, Speculator

pytestmark = pytest.mark.pure

# A step bound by reading weights: eight tokens cost little more than one.
BOUND = SpeculationCosts(
    decode=Curve(((1, 1.0), (8, 1.2), (32, 3.0))),
    verify=Curve(((1, 1.0), (8, 1.1), (32, 2.8))),
    draft=Curve(((1, 0.05), (32, 0.2))),
)
# A step bound by arithmetic: each token costs the same.
LINEAR = SpeculationCosts(
    decode=Curve(((1, 1.0), (32, 32.0))), verify=Curve(((1, 1.0), (32, 32.0))), draft=Curve(((1, 0.1),))
)


def test_curves_run_straight_between_and_beyond_their_points():
    curve = Curve(((1, 1.0), (3, 2.0), (5, 2.0)))
    assert [curve.at(count) for count in (1, 2, 3, 4, 5, 9)] == [1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert Curve(((2, 1.0),)).at(1) == 1.0
    assert Curve(((2, 1.0),)).at(6) == 3.0
    assert Curve().at(7) == 0.0
    assert Curve(((1, 5.0), (2, 1.0))).at(9) == 0.0


def test_step_seconds_are_exact_where_they_were_measured():
    assert BOUND.step_s(8, 8) == pytest.approx(1.2)
    assert BOUND.step_s(1, 8) == pytest.approx(1.1)
    assert BOUND.step_s(8, 32) == pytest.approx(2.9)


def test_what_slows_one_measurement_as_a_whole_does_not_count(monkeypatch):
    """Decoding was timed while another process ran, verifying was not."""
    monkeypatch.setattr(speculation_costs._Bench, "decode", lambda bench: {1: 3.0, 2: 3.6, 4: 6.0})
    monkeypatch.setattr(speculation_costs._Bench, "verify", lambda bench: {1: 2.0, 2: 2.2, 4: 3.0})
    executor = SimulatedExecutor(simulated_caps())
    costs = speculation_costs.measure_costs(executor, RuntimeConfig())
    executor.close()
    assert dict(costs.decode.points) == pytest.approx({1: 2.0, 2: 2.4, 4: 4.0})
    assert costs.verify.points == ((1, 2.0), (2, 2.2), (4, 3.0))


def test_drafting_pays_where_tokens_are_nearly_free_and_not_where_they_are_not():
    for most in (1, 4):
        assert DraftPolicy(most, BOUND).choose(1) == most
        assert DraftPolicy(most, LINEAR).choose(1) == 0
    assert DraftPolicy(4).choose(3) == 4
    assert DraftPolicy(4, BOUND).choose(0) == 0
    assert DraftPolicy(4, BOUND).choose(2, ()) == 0


def test_drafts_at_hand_cost_nothing_to_make():
    dear = SpeculationCosts(decode=BOUND.decode, verify=BOUND.verify, draft=Curve(((1, 9.0),)))
    assert DraftPolicy(4, dear).choose(1) == 0
    assert DraftPolicy(4, dear).choose(1, (4,)) == 4
    assert DraftPolicy(4, dear).choose(2, (4, 2)) == 4


def test_a_call_of_the_draft_model_is_paid_once_however_many_it_drafts():
    calls = SpeculationCosts(
        decode=BOUND.decode, verify=BOUND.verify, draft=Curve(((1, 0.01),)), draft_call=Curve(((1, 0.5),))
    )
    assert calls.draft_s(1, 0) == 0.0
    assert calls.draft_s(1, 4) == pytest.approx(0.54)
    assert calls.draft_s(2, 4) == pytest.approx(1.08)
    assert DraftPolicy(4, calls).choose(1) == 4
    assert DraftPolicy(1, replace(calls, draft_call=Curve(((1, 0.9),)))).choose(1) == 0


def test_what_is_rejected_ends_drafting_but_for_a_probe():
    policy = DraftPolicy(4, BOUND)
    for _ in range(300):
        policy.acceptance.observe(4, 0)
    chosen = [policy.choose(1) for _ in range(7 * PROBE_STEPS)]
    assert [step + 1 for step, count in enumerate(chosen) if count] == [
        *range(PROBE_STEPS, PROBE_STEPS + PROBE_RUN),
        *range(3 * PROBE_STEPS, 3 * PROBE_STEPS + PROBE_RUN),
        7 * PROBE_STEPS,
    ]
    assert policy.is_probe
    assert max(chosen) == 1
    hopeless = DraftPolicy(4, LINEAR)
    assert not any(hopeless.choose(32) for _ in range(3 * PROBE_STEPS))
    for _ in range(300):
        policy.acceptance.observe(1, 1)
    assert policy.choose(1) >= 1


def test_where_no_draft_could_pay_none_is_looked_for():
    assert DraftPolicy(4).can_pay(9, is_free=True)
    for is_free in (False, True):
        assert DraftPolicy(4, BOUND).can_pay(1, is_free)
        assert not DraftPolicy(4, LINEAR).can_pay(8, is_free)
    proposer = Copies()
    speculator = Speculator(proposer, DraftPolicy(4, LINEAR))
    assert [speculator.propose([object()] * 8) for _ in range(20)] == [{}] * 20
    assert proposer.asked == []


class Copies:
    """Has two drafts for every request, and notes for how many it was asked."""

    def __init__(self, is_free=True):
        self.is_free = is_free
        self.asked = []

    def propose(self, requests, k):
        self.asked.append(len(requests))
        return dict.fromkeys(requests, (1, 1)[:k])

    def forget(self, request_id):
        pass


def running(number):
    request = Request(
        request_id=number, prompt_token_ids=(1, 2), max_tokens=90, sampling=SamplingState(), arrival_s=0.0
    )
    return RunningRequest(
        request=request, row=number, token_ids=[1, 2, 3], blocks=None, num_computed=2, num_scheduled=2
    )


def test_worthless_drafts_are_looked_for_more_and_more_rarely():
    proposer, policy = Copies(), DraftPolicy(4, BOUND)
    speculator = Speculator(proposer, policy)
    requests = [running(0), running(1)]
    assert set(speculator.propose(requests)) == set(requests)
    speculator.observe(2, 0, times=400)
    looked = []
    for _ in range(64):
        before = len(proposer.asked)
        assert speculator.propose(requests) == {}
        looked.append(len(proposer.asked) - before)
    assert [step for step, times in enumerate(looked) if times] == [0, 2, 6, 14, 30, 46, 62]
    speculator.observe(2, 2, times=400)
    for _ in range(MOST_REST + 1):
        found = speculator.propose(requests)
    assert set(found) == set(requests)


def test_where_a_text_repeats_nothing_drafts_are_looked_for_more_rarely():
    class Found(Copies):
        has_some = False

        def propose(self, requests, k):
            drafts = super().propose(requests, k)
            return drafts if self.has_some else {}

    def looks(costs, steps):
        proposer = Found()
        speculator = Speculator(proposer, DraftPolicy(4, costs))
        places = []
        for step in range(steps):
            before = len(proposer.asked)
            assert speculator.propose([running(0)]) == {}
            places += [step] * (len(proposer.asked) - before)
        return places, proposer, speculator

    def scaled(factor):
        curves = (BOUND.decode, BOUND.verify, BOUND.draft)
        decode, verify, draft = (
            Curve(tuple((count, seconds * factor) for count, seconds in curve.points)) for curve in curves
        )
        return SpeculationCosts(decode=decode, verify=verify, draft=draft)

    every_step = looks(scaled(LOOK_S * 1000), 40)[0]
    assert every_step == [*range(40)]  # where a step takes long enough, a look costs nothing
    assert looks(scaled((LOOK_S + LOOK_EACH_S) * 55), 14)[0] == [0, 1, 2, 3, 5, 7, 9, 11, 13]
    places, proposer, speculator = looks(scaled(LOOK_S), 100)
    assert places == [0, 1, 2, 3, 5, 7, 9, 11, 15, 19, 23, 27, 35, 43, 51, 59, 75, 91]
    proposer.has_some = True
    steps = next(step for step in range(20) if speculator.propose([running(0)]))
    assert steps <= MOST_REST
    assert speculator.propose([running(0)])  # and in every step from then on


def test_a_probe_with_a_draft_model_is_one_request():
    proposer = Copies(is_free=False)
    speculator = Speculator(proposer, DraftPolicy(4, BOUND))
    speculator.observe(4, 0, times=400)
    requests = [running(0), running(1)]
    requests[0].token_ids.append(4)
    found = [speculator.propose(requests) for _ in range(PROBE_STEPS)]
    assert found == [{}] * (PROBE_STEPS - 1) + [{requests[1]: (1,)}]  # the shorter one: less to catch up
    assert proposer.asked == [1]


def test_a_trial_waits_for_a_short_request_and_not_for_ever():
    for lengths, step in (([90] * 150 + [30] * 400, 151), ([90] * 600, PROBE_PATIENCE * PROBE_STEPS)):
        speculator = Speculator(Copies(is_free=False), DraftPolicy(4, BOUND))
        speculator.observe(4, 0, times=400)
        request = running(0)
        drafted: list[int] = []
        for place, length in enumerate(lengths):
            request.token_ids = [1] * length
            if speculator.propose([request]):
                drafted.append(place + 1)
        assert drafted[0] == step


def test_a_draft_model_that_does_not_pay_is_seldom_asked_about():
    policy = DraftPolicy(4, BOUND)
    speculator = Speculator(Copies(is_free=False), policy)
    requests, rested = [running(0)], 0
    for _ in range(PLAIN_FIRST):
        assert speculator.propose(requests)
    for _ in range(PLAIN_RUN):
        assert not speculator.propose(requests)  # plain steps now and then, and no rest behind them
        assert not speculator.is_resting
    assert speculator.propose(requests)
    speculator.observe(4, 0, times=400)
    for _ in range(PROBE_STEPS - 1):
        rested += speculator.is_resting
        assert not speculator.propose(requests)
    assert rested > 0.8 * PROBE_STEPS
    assert speculator.propose(requests)


def test_acceptance_is_by_place_and_forgets():
    acceptance = Acceptance(3)
    for _ in range(2000):
        acceptance.observe(3, 1)
    expected = acceptance.expected()
    assert expected[0] == 0.0
    assert expected[1] == pytest.approx(1.0, abs=0.02)
    assert expected[2] == pytest.approx(1.0, abs=0.05)
    for _ in range(600):
        acceptance.observe(3, 0)
    assert acceptance.expected()[1] < 0.1


@given(
    seconds=st.lists(st.floats(0.01, 10.0), min_size=6, max_size=6),
    draft_s=st.floats(0.0, 5.0),
    observed=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=40),
    num_requests=st.integers(1, 32),
)
def test_what_is_chosen_is_expected_to_be_faster(seconds, draft_s, observed, num_requests):
    counts = (1, 2, 4, 8, 16, 160)
    points = Curve(tuple(zip(counts, sorted(seconds), strict=True)))
    costs = SpeculationCosts(decode=points, verify=points, draft=Curve(((1, draft_s),)))
    policy = DraftPolicy(4, costs)
    for drafted, accepted in observed:
        policy.acceptance.observe(drafted, min(drafted, accepted))
    count = policy.choose(num_requests)
    if count:
        gained = num_requests * (1 + policy.acceptance.expected()[count])
        took = costs.step_s(num_requests, num_requests * (1 + count)) + count * costs.draft.at(num_requests)
        assert gained / took > MARGIN * num_requests / costs.step_s(num_requests, num_requests)


def serve(policy, truth, num_requests, share, steps, rng, behind_drafts=1.0, rare_s=0.0):
    """Speed over plain decoding's, of `steps` steps that take what `truth` says, `share` of the drafts being
    accepted; plain steps right behind drafted ones take `behind_drafts` times as long, and the first four
    drafted ones in a row `rare_s` longer. Some of the measured seconds are disturbed; those that count are
    not."""
    seconds, tokens, was_drafted, in_a_row = 0.0, 0, False, 0
    for _ in range(steps):
        count = policy.choose(num_requests) if policy.can_pay(num_requests, False) else 0
        asked = 0 if not count else 1 if policy.is_probe else num_requests
        took = truth.step_s(num_requests, num_requests + asked * count) + truth.draft_s(asked, count)
        took *= behind_drafts if was_drafted and not count else 1.0
        was_drafted = count > 0
        in_a_row = in_a_row + 1 if was_drafted else 0
        took += rare_s if 0 < in_a_row <= 4 else 0.0
        for _ in range(asked):
            accepted = next((place for place in range(count) if rng.random() >= share), count)
            policy.acceptance.observe(count, accepted)
            tokens += accepted
        tokens += num_requests
        seconds += took
        took *= rng.choice((0.97, 1.02, 4.0)) if rng.random() < 0.1 else 1.0
        policy.observe_step(num_requests, num_requests + asked * count, asked, count, took)
    return tokens / seconds * truth.step_s(num_requests, num_requests) / num_requests


@pytest.mark.parametrize("num_requests", [1, 8, 32])
@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("wrong", [0.5, 1.0, 2.0])
def test_a_table_that_is_wrong_costs_little_whichever_way(num_requests, share, wrong):
    """Verifying and drafting take `wrong` times what the table says, but no token less than none."""
    for table in (BOUND, LINEAR):
        verify = [(1, 1.0), *((count, max(1.0, wrong * s)) for count, s in table.verify.points[1:])]
        draft = [(count, wrong * s) for count, s in table.draft.points]
        truth = replace(table, verify=Curve(tuple(verify)), draft=Curve(tuple(draft)))
        policy = DraftPolicy(4, table)
        assert serve(policy, truth, num_requests, share, 2000, random.Random(5)) > 0.97


def test_drafts_at_hand_now_and_then_are_found_to_be_too_dear():
    """N-grams are found in few steps in a row: what a single drafted step takes counts, too."""
    table = replace(BOUND, verify=Curve(((1, 1.0), (8, 1.0), (32, 1.0))))
    policy, rng, drafted = DraftPolicy(2, table), random.Random(4), []
    for step in range(1200):
        count = policy.choose(1, (1,)) if step % 3 == 0 else 0
        if count:
            policy.acceptance.observe(1, rng.random() < 0.3)
            drafted.append(step)
        policy.observe_step(1, 1 + count, 0, 0, 1.5 if count else 1.0)
    assert len([step for step in drafted if step >= 600]) < 14


def test_drafts_that_a_table_thought_too_dear_are_found_to_pay():
    dear = replace(BOUND, verify=Curve(((1, 1.0), (2, 2.2), (8, 4.0), (32, 9.0))))
    assert not DraftPolicy(2, dear).choose(1)
    policy = DraftPolicy(2, dear)
    late = [serve(policy, BOUND, 1, 0.8, 1000, random.Random(seed)) for seed in range(3)][-1]
    right = serve(DraftPolicy(2, BOUND), BOUND, 1, 0.8, 1000, random.Random(2))
    assert right > 1.6
    assert late > 0.95 * right


@pytest.mark.parametrize(
    ("share", "call_s", "least"),
    [(0.3, 0.2, 0.97), (0.7, 0.8, 0.97), (0.78, 0.8, 0.97), (0.78, 0.2, 1.2), (0.85, 0.4, 1.15)],
)
def test_a_draft_model_that_is_slow_when_it_is_seldom_called_is_judged_by_what_it_does_in_a_row(
    share, call_s, least
):
    """A small model's steps: drafting brings 0.9, 0.9, 1.0, 1.3 and 1.27 times plain decoding's speed."""
    small = SpeculationCosts(
        decode=Curve(((1, 1.0), (32, 14.0))),
        verify=Curve(((1, 1.0), (2, 1.18), (3, 1.47), (4, 1.82), (8, 3.5), (32, 14.0))),
        draft=Curve(((1, 0.09),)),
        draft_call=Curve(((1, 0.2),)),
    )
    truth = replace(small, draft_call=Curve(((1, call_s),)))
    for seed in range(3):
        assert serve(DraftPolicy(4, small), truth, 1, share, 4000, random.Random(seed), rare_s=0.6) > least


def test_plain_steps_are_taken_now_and_then_while_drafts_pay():
    policy = DraftPolicy(2, BOUND)
    first = [policy.choose(1) > 0 for _ in range(PLAIN_FIRST + PLAIN_RUN)]
    assert first == [True] * PLAIN_FIRST + [False] * PLAIN_RUN
    chosen = [policy.choose(1) > 0 for _ in range(3 * PLAIN_EVERY)]
    assert chosen == 3 * ([True] * (PLAIN_EVERY - PLAIN_RUN) + [False] * PLAIN_RUN)


def test_the_first_plain_step_behind_drafts_says_nothing_of_plain_steps():
    """It takes longer than those behind plain ones: believed, it would make drafts look cheap."""
    table = replace(BOUND, verify=Curve(((1, 1.0), (2, 1.35), (8, 4.0), (32, 9.0))))
    policy, rng = DraftPolicy(1, table), random.Random(3)
    serve(policy, table, 1, 0.9, 4000, rng, behind_drafts=2.5)
    assert serve(policy, table, 1, 0.3, 4000, rng, behind_drafts=2.5) > 0.97


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 7), max_size=60),
    sizes=st.sampled_from([(1, 1), (2, 4), (3, 3), (1, 5)]),
    k=st.integers(1, 5),
)
def test_an_n_gram_index_finds_what_a_search_of_the_text_finds(tokens, cuts, sizes, k):
    """However the text grows between calls."""
    index, length = NgramIndex(*sizes), 0
    for step in (*cuts, len(tokens)):
        length = min(len(tokens), length + step)
        known = tokens[:length]
        want = ()
        for size in range(sizes[1], sizes[0] - 1, -1):
            ends = [end for end in range(size, length) if known[end - size : end] == known[-size:]]
            if ends and length > size:
                copied = list(known)
                for place in range(k):
                    copied.append(copied[ends[-1] + place])
                want = tuple(copied[length:])
                break
        assert index.propose(known, k) == want
