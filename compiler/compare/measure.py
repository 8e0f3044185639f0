"""The same work through every side, interleaved: in each round every side does the same, in another order.

Knows runners and rounds; what the numbers mean is the table's business.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from .runner import Batch, Facts, Runner, Single
from .statistics import Ratio, paired_ratio

PROCESSES = 3
_MIN_ROUNDS, _WARM_ROUNDS = 6, 1
# The share of the budget that loading all sides may take for them to be loaded more than once.
_LOADING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What each round is made of. `prompts` are token ids; a batch is the first of them `concurrency` at a
    time, repeated where there are fewer."""

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int
    concurrency: int
    rounds: int
    budget_s: float


@dataclass(slots=True)
class Samples:
    """What one side did: each round's requests, a prompt each, and its batch."""

    facts: Facts
    singles: list[tuple[Single, ...]] = field(default_factory=list[tuple[Single, ...]])
    batches: list[Batch] = field(default_factory=list[Batch])

    @property
    def ttft_s(self) -> list[float]:
        """A number a round: the median over its prompts."""
        return [statistics.median(single.ttft_s for single in singles) for singles in self.singles]

    @property
    def tpot_s(self) -> list[float]:
        """A number a round: the median over its prompts."""
        return [statistics.median(single.tpot_s for single in singles) for singles in self.singles]

    @property
    def batch_s(self) -> list[float]:
        """Seconds per token of each round's batch."""
        return [batch.wall_s / max(1, batch.output_tokens) for batch in self.batches]

    @property
    def token_ids(self) -> dict[int, tuple[int, ...]]:
        """The tokens that were made for each prompt, by its index."""
        return {index: single.token_ids for index, single in enumerate(self.singles[-1])}


def side_ratios(own: Samples, base: Samples, *, rng: random.Random) -> dict[str, Ratio]:
    """Ratios of what one side did to what the baseline did, by column; those without a time are left out.

    Times are divided request by request, since a request and its twin ran back to back; a round's ratio is
    the median over its prompts.
    """
    found = {
        "ttft_s": _round_ratios(own, base, lambda single: single.ttft_s),
        "tpot_s": _round_ratios(own, base, lambda single: single.tpot_s),
        "throughput_tokens_per_s": [b / o for o, b in zip(own.batch_s, base.batch_s, strict=True) if o > 0],
    }
    ratios = {key: paired_ratio(values, [1.0] * len(values), rng=rng) for key, values in found.items()}
    return {key: ratio for key, ratio in ratios.items() if ratio is not None}


def _round_ratios(own: Samples, base: Samples, time_of: Callable[[Single], float]) -> list[float]:
    ratios: list[float] = []
    for ours, theirs in zip(own.singles, base.singles, strict=True):
        pairs = [(time_of(one), time_of(two)) for one, two in zip(ours, theirs, strict=True)]
        known = [one / two for one, two in pairs if one > 0 and two > 0]
        if known:
            ratios.append(statistics.median(known))
    return ratios


def measure_in_processes(
    open_runners: Mapping[str, Callable[[], Runner]],
    work: Work,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    watch: Callable[[int, int, str], None],
) -> dict[str, Samples]:
    """`measure_sides` in PROCESSES processes of each side one after the other, where the work does for it:
    two processes of one artifact differ by where their memory lies, and no number of rounds averages
    that out (Kalibera and Jones 2013). Once only where there are few rounds, or loading takes long.
    """
    merged: dict[str, Samples] = {}
    done, total = 0, 1
    while done < total:
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for name, open_runner in open_runners.items():
                runners[name] = open_runner()
                stack.callback(runners[name].close)
            if done == 0:
                total = _num_processes([runner.facts() for runner in runners.values()], work)
            share = replace(work, rounds=-(-work.rounds // total), budget_s=work.budget_s / total)
            found = measure_sides(runners, share, rng=rng, clock=clock, watch=watch)
        for name, samples in found.items():
            merged[name] = samples if done == 0 else _joined(merged[name], samples)
        done += 1
    return merged


def _num_processes(facts: Sequence[Facts], work: Work) -> int:
    is_long = sum(fact.load_s for fact in facts) > _LOADING * work.budget_s
    return 1 if is_long or work.rounds < PROCESSES * _MIN_ROUNDS else PROCESSES


def _joined(one: Samples, two: Samples) -> Samples:
    """Loading took what it took the first time; memory the most it ever was."""
    facts = one.facts._replace(peak_bytes=max(one.facts.peak_bytes, two.facts.peak_bytes))
    return Samples(facts=facts, singles=one.singles + two.singles, batches=one.batches + two.batches)


def measure_sides(
    runners: Mapping[str, Runner],
    work: Work,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    watch: Callable[[int, int, str], None],
) -> dict[str, Samples]:
    """`work` through every runner. Ends after `rounds`, or earlier once `budget_s` seconds have passed and
    there are enough rounds for an interval.

    Within a round, each prompt goes through all sides back to back before the next prompt does, in an order
    drawn anew; so noise that lasts longer than one request falls on all alike.
    """
    samples = {name: Samples(facts=runner.facts()) for name, runner in runners.items()}
    _warm(runners, work)
    started = clock()
    for number in range(work.rounds):
        if number >= _MIN_ROUNDS and clock() - started > work.budget_s:
            break
        watch(number, work.rounds, f"round {number + 1}")
        _one_round(runners, work, samples, rng)
    for name, runner in runners.items():
        samples[name].facts = runner.facts()
    return samples


def _warm(runners: Mapping[str, Runner], work: Work) -> None:
    for _ in range(_WARM_ROUNDS):
        for runner in runners.values():
            runner.single(work.prompts[0], min(work.num_tokens, 8))
            runner.batch(_batch(work), min(work.num_tokens, 4))


def _one_round(
    runners: Mapping[str, Runner], work: Work, samples: Mapping[str, Samples], rng: random.Random
) -> None:
    singles: dict[str, list[Single]] = {name: [] for name in runners}
    for prompt in work.prompts:
        for name in rng.sample(list(runners), len(runners)):
            singles[name].append(runners[name].single(prompt, work.num_tokens))
    for name in rng.sample(list(runners), len(runners)):
        samples[name].batches.append(runners[name].batch(_batch(work), work.num_tokens))
    for name, found in singles.items():
        samples[name].singles.append(tuple(found))


def _batch(work: Work) -> Sequence[tuple[int, ...]]:
    return [work.prompts[index % len(work.prompts)] for index in range(work.concurrency)]
