"""Ratios of paired times with intervals that are wrong as seldom as they say. Arithmetic alone."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two processes of one artifact differ by about this much, for where their memory happens to lie: no number
# of repeats within them shows it, so every interval is widened by it.
PLACEMENT = 0.01
# Share of comparisons of equals that may come out as different.
ALPHA = 0.002
_RESAMPLES = 4000


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
    draws = np.random.default_rng(rng.getrandbits(63)).integers(0, len(logs), (_RESAMPLES, len(logs)))
    samples = np.asarray(logs)[draws]
    own = samples.std(axis=1, ddof=1) / math.sqrt(len(logs))
    known = own > 1e-12
    if known.sum() < _RESAMPLES // 2:  # too few rounds to tell: nearly all resamples are alike
        return -math.inf, math.inf
    scores = (samples.mean(axis=1)[known] - centre) / own[known]
    low, high = np.quantile(scores, [ALPHA / 2, 1 - ALPHA / 2])
    return centre - float(high) * spread, centre - float(low) * spread


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
