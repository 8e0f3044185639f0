"""Equals are told from unequals: seldom a false difference, a planted one found with its size."""

from __future__ import annotations

import math
import random

import pytest

from llmc.compiler.compare.measure import PROCESSES, Work, measure_in_processes, measure_sides
from llmc.compiler.compare.runner import Batch, Facts, Single
from llmc.compiler.compare.statistics import paired_ratio, pareto


def noisy(rng, mean, spread, drift):
    """A time with noise of its own and a share of what the whole machine does."""
    burst = 3.0 if rng.random() < 0.02 else 1.0
    return mean * drift * math.exp(rng.gauss(0, spread)) * burst


class NoisyRunner:
    """A side of known speed on a noisy machine whose speed drifts."""

    def __init__(self, world, tpot_s):
        self.world, self.tpot_s = world, tpot_s

    def single(self, prompt, num_tokens):
        self.world["drift"] *= math.exp(self.world["rng"].gauss(0, 0.01))
        tpot = noisy(self.world["rng"], self.tpot_s, 0.05, self.world["drift"])
        return Single(4 * tpot, tpot, tuple(range(num_tokens)))

    def batch(self, prompts, num_tokens):
        tpot = noisy(self.world["rng"], self.tpot_s, 0.05, self.world["drift"])
        made = len(prompts) * num_tokens
        return Batch(tpot * made / 2, made, ((4 * tpot, tpot),) * len(prompts))

    def facts(self):
        return Facts(1.0, 1, "noisy")

    def close(self):
        pass


def measured(seed, other):
    world = {"rng": random.Random(seed), "drift": 1.0}
    runners = {"one": NoisyRunner(world, 0.01), "two": NoisyRunner(world, other)}
    work = Work(prompts=((1,), (2,), (3,)), num_tokens=8, concurrency=2, rounds=120, budget_s=1e9)
    samples = measure_sides(
        runners, work, rng=random.Random(seed), clock=lambda: 0.0, watch=lambda *told: None
    )
    one, two = samples["one"], samples["two"]
    rng = random.Random(seed)
    return {
        name: paired_ratio(getattr(two, name), getattr(one, name), rng=rng)
        for name in ("ttft_s", "tpot_s", "batch_s")
    }


def test_equals_never_differ_in_twenty_runs():
    ratios = [ratio for seed in range(20) for ratio in measured(seed, 0.01).values()]
    assert not [ratio for ratio in ratios if ratio.is_different]


@pytest.mark.parametrize("seed", range(5))
def test_five_percent_are_found_with_their_size(seed):
    ratio = measured(seed, 0.0105)["tpot_s"]
    assert ratio.is_different
    assert ratio.ratio == pytest.approx(1.05, abs=0.015)
    faster = measured(seed, 0.01 / 1.05)["tpot_s"]
    assert faster.is_different
    assert faster.ratio == pytest.approx(1 / 1.05, abs=0.015)


def opened_often(load_s, rounds):
    """How often each side is opened and closed, and the rounds that came of it."""
    world = {"rng": random.Random(0), "drift": 1.0}
    events = []

    class Counted(NoisyRunner):
        def __init__(self):
            super().__init__(world, 0.01)
            events.append("open")

        def facts(self):
            return Facts(load_s, len(events), "noisy")

        def close(self):
            events.append("close")

    work = Work(prompts=((1,),), num_tokens=8, concurrency=2, rounds=rounds, budget_s=10.0)
    samples = measure_in_processes(
        {"one": Counted, "two": Counted},
        work,
        rng=random.Random(0),
        clock=lambda: 0.0,
        watch=lambda *told: None,
    )
    assert events.count("open") == events.count("close")
    return events.count("open") // 2, samples["one"]


def test_sides_are_loaded_more_than_once_where_that_takes_little():
    times, samples = opened_often(load_s=0.5, rounds=60)
    assert times == PROCESSES
    assert len(samples.singles) == len(samples.batches) == 60
    assert samples.facts.peak_bytes > 4, "the most of all its processes"
    assert opened_often(load_s=5.0, rounds=60)[0] == 1
    assert opened_often(load_s=0.5, rounds=4)[0] == 1


def test_one_round_tells_nothing_and_none_is_none():
    rng = random.Random(0)
    assert not paired_ratio([2.0], [1.0], rng=rng).is_different
    assert paired_ratio([], [], rng=rng) is None
    assert paired_ratio([0.0], [1.0], rng=rng) is None


def test_the_front_leaves_out_what_is_beaten_and_what_is_unknown():
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (math.nan, 0.0), "e": (2.0, 2.0)}
    assert pareto(points) == ("a", "b", "e")
