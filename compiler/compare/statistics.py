"""Ratios of paired times with intervals that are wrong as seldom as they say. Arithmetic alone."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two processes of one artifact differ by about this much, for where their memory happens to lie: no number
# of repeats within them shows it, so every interval is widened by it.
PLACEMENT = 0.01
# Share of comparisons of equals that may come out as different.
ALPHA = 0.002
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as large a number is as the baseline's, and the interval that holds it."""

    ratio: float
    low: float
    high: float

    @property
    def is_different(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1.0 <= self.high


def paired_ratio(
    values: Sequence[float], baseline: Sequence[float], *, rng: random.Random, placement: float = PLACEMENT
) -> Ratio | None:
    """The ratio of `values` to `baseline`, pair by pair, its interval by the studentised bootstrap.

    Each pair is one round, in which both sides did the same work back to back. None without a pair of
    positive numbers. With one round there is no interval but everything.
    """
    logs = [math.log(v / b) for v, b in zip(values, baseline, strict=True) if v > 0 and b > 0]
    if not logs:
        return None
    centre = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(ratio=math.exp(centre), low=0.0, high=math.inf)
    spread = statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = _studentised(logs, centre, spread, rng)
    margin = math.log1p(placement)
    return Ratio(ratio=math.exp(centre), low=math.exp(low - margin), high=math.exp(high + margin))


def _studentised(logs: list[float], centre: float, spread: float, rng: random.Random) -> tuple[float, float]:
    if spread == 0.0:
        return centre, centre
    found: list[float] = []
    for _ in range(_RESAMPLES):
        sample = rng.choices(logs, k=len(logs))
        own = statistics.stdev(sample) / math.sqrt(len(sample))
        if own > 0.0:
            found.append((statistics.fmean(sample) - centre) / own)
    found.sort()
    if len(found) < _RESAMPLES // 2:  # too few rounds to tell: nearly all resamples are alike
        return -math.inf, math.inf
    edge = max(0, math.floor(len(found) * ALPHA / 2))
    return centre - found[-1 - edge] * spread, centre - found[edge] * spread


def bootstrap_difference(
    values: Sequence[float], baseline: Sequence[float], *, rng: random.Random
) -> tuple[float, float]:
    """The interval of the mean difference of paired numbers, by the percentile bootstrap."""
    gaps = [value - base for value, base in zip(values, baseline, strict=True)]
    means = sorted(statistics.fmean(rng.choices(gaps, k=len(gaps))) for _ in range(_RESAMPLES))
    edge = max(0, math.floor(len(means) * ALPHA / 2))
    return means[edge], means[-1 - edge]


def pareto(points: dict[str, tuple[float, ...]]) -> tuple[str, ...]:
    """The names that no other point is at least as good as in everything and better in something; less is
    better. Points with a number missing (NaN) are on no front."""
    front: list[str] = []
    for name, own in points.items():
        if any(math.isnan(value) for value in own):
            continue
        beaten = any(
            all(a <= b for a, b in zip(other, own, strict=True)) and other != own
            for rival, other in points.items()
            if rival != name and not any(math.isnan(value) for value in other)
        )
        if not beaten:
            front.append(name)
    return tuple(front)
