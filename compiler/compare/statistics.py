"""Ratios of paired times with intervals that are wrong as seldom as they say. Arithmetic alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Two processes of one artifact differ by about this much, for where their memory happens to lie: no number
# of repeats within them shows it, so every interval is widened by it.
PLACEMENT = 0.01
# Share of comparisons of equals that may come out as different.
ALPHA = 0.002
# Share of rounds left out at each end.
TRIM = 0.2
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
    """The ratio of `values` to `baseline`, pair by pair, its interval by the studentised bootstrap of the
    trimmed mean of logarithms: what preempts one side in a few rounds moves it little.

    Each pair is one round, in which both sides did the same work back to back. None without a pair of
    positive numbers. With one round there is no interval but everything.
    """
    logs = np.asarray([math.log(v / b) for v, b in zip(values, baseline, strict=True) if v > 0 and b > 0])
    if not logs.size:
        return None
    if logs.size == 1:
        return Ratio(ratio=math.exp(logs[0]), low=0.0, high=math.inf)
    centre, spread = (float(found[0]) for found in _trimmed(logs[None]))
    low, high = _studentised(logs, centre, spread, rng)
    margin = math.log1p(placement)
    return Ratio(ratio=math.exp(centre), low=math.exp(low - margin), high=math.exp(high + margin))


def _studentised(
    logs: NDArray[np.float64], centre: float, spread: float, rng: random.Random
) -> tuple[float, float]:
    if np.ptp(logs) == 0.0:
        return centre, centre
    draws = np.random.default_rng(rng.getrandbits(63)).integers(0, logs.size, (_RESAMPLES, logs.size))
    centres, own = _trimmed(logs[draws])
    known = own > 1e-12
    if spread <= 1e-12 or known.sum() < _RESAMPLES // 2:  # too few rounds to tell: resamples are alike
        return -math.inf, math.inf
    scores = (centres[known] - centre) / own[known]
    low, high = np.quantile(scores, [ALPHA / 2, 1 - ALPHA / 2])
    return centre - float(high) * spread, centre - float(low) * spread


def _trimmed(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each row the mean without its outermost shares, and that mean's standard error: the deviation of the
    row with those shares drawn in to the nearest value kept (Tukey and McLaughlin 1963)."""
    ordered = np.sort(rows, axis=1)
    count = rows.shape[1]
    cut = int(TRIM * count)
    kept = ordered[:, cut : count - cut]
    drawn_in = np.clip(ordered, kept[:, :1], kept[:, -1:])
    error = drawn_in.std(axis=1, ddof=1) / ((1 - 2 * cut / count) * math.sqrt(count))
    return kept.mean(axis=1), error


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
