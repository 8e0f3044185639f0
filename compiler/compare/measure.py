"""The same work through every side, interleaved: in each round every side does the same, in another order.

Knows runners and rounds; what the numbers mean is the table's business.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .runner import Batch, Facts, Runner, Single

_MIN_ROUNDS, _WARM_ROUNDS = 6, 1


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
    """What one side did: a number a round, and the tokens it made for each prompt."""

    facts: Facts
    ttft_s: list[float] = field(default_factory=list[float])
    tpot_s: list[float] = field(default_factory=list[float])
    batch_s: list[float] = field(default_factory=list[float])
    batches: list[Batch] = field(default_factory=list[Batch])
    token_ids: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])


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
    for index, prompt in enumerate(work.prompts):
        for name in rng.sample(list(runners), len(runners)):
            single = runners[name].single(prompt, work.num_tokens)
            singles[name].append(single)
            samples[name].token_ids[index] = single.token_ids
    for name in rng.sample(list(runners), len(runners)):
        batch = runners[name].batch(_batch(work), work.num_tokens)
        samples[name].batches.append(batch)
        samples[name].batch_s.append(batch.wall_s / max(1, batch.output_tokens))
    for name, found in singles.items():
        samples[name].ttft_s.append(statistics.median(single.ttft_s for single in found))
        samples[name].tpot_s.append(statistics.median(single.tpot_s for single in found))


def _batch(work: Work) -> Sequence[tuple[int, ...]]:
    return [work.prompts[index % len(work.prompts)] for index in range(work.concurrency)]
