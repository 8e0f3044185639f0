"""Choose one option for each of several units: the least total loss within a total of bytes.

The multiple-choice knapsack problem, by dynamic programming over bytes (Dudzinski & Walukiewicz 1987). Knows
numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Sizes of models with regular shapes share large divisors; only odd ones come to more sums than this.
MOST_SUMS = 1 << 18


class Assignment(NamedTuple):
    """The option of each unit by index. Sizes above the least were counted in steps of `step` bytes; when
    `exact`, every size is a whole number of steps, and no other choice within the bytes loses less."""

    options: tuple[int, ...]
    step: int
    exact: bool


def assign(
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    capacity: int,
    most_sums: int = MOST_SUMS,
    *,
    enough: float = 0.0,
) -> Assignment:
    """The options of least total loss whose sizes add up to at most `capacity` bytes; of equal ones the
    smallest. `sizes` and `losses` are by unit and option; where a total loss of `enough` can be kept to, the
    smallest sizes that do are taken.

    Up to `most_sums` sums of bytes are told apart. Where there are more, sizes are rounded up to whole
    steps: the result still fits, and loses no more than the best for a capacity that is smaller by a step for
    each unit. Raises ValueError when even the smallest options do not fit.
    """
    least = [min(own) for own in sizes]
    above = [[size - low for size in own] for own, low in zip(sizes, least, strict=True)]
    spare = capacity - sum(least)
    if spare < 0:
        raise ValueError(f"the smallest options take {sum(least)} bytes, more than {capacity}")
    divisor = math.gcd(*(size for own in above for size in own)) or 1
    useful = min(spare, sum(max(own) for own in above))
    step = max(divisor, -(-useful // (most_sums - 1)))
    counts = [[-(-size // step) for size in own] for own in above]
    room = min(spare // step, sum(max(own) for own in counts))
    return Assignment(_solve(counts, losses, room, enough), step, step == divisor)


def _solve(
    counts: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int, enough: float
) -> tuple[int, ...]:
    """`best[r]` is the least loss of the units so far that take exactly `r` steps."""
    best = torch.full((room + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    picks: list[Tensor] = []
    for own, lost in zip(counts, losses, strict=True):
        tried = torch.full((len(own), room + 1), math.inf, dtype=torch.float64)
        for option, (count, loss) in enumerate(zip(own, lost, strict=True)):
            if count <= room:
                tried[option, count:] = best[: room + 1 - count] + loss
        best, pick = tried.min(0)
        picks.append(pick.to(torch.int16))
    place = int(best.clamp_min(enough).argmin())
    chosen: list[int] = []
    for own, pick in zip(reversed(counts), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= own[chosen[-1]]
    return tuple(reversed(chosen))
