"""How long steps take against what a table says of them, learnt from each step. Arithmetic over ratios; no
clock."""

from __future__ import annotations

import math

# The share that one step has in what is believed, once many were seen; and how far one pulls, in logarithms,
# since a step that was disturbed takes many times as long as others.
LEAST_SHARE = 0.05
MOST_PULL = 0.7


class Pace:
    """A running mean of ratios, measured seconds over expected ones. 1 until something was observed."""

    def __init__(self) -> None:
        self.num_observed = 0
        self._log = 0.0

    @property
    def factor(self) -> float:
        """What to multiply expected seconds with."""
        return math.exp(self._log)

    def observe(self, ratio: float) -> None:
        """One more step; `ratio` is positive."""
        self.num_observed += 1
        pull = min(max(math.log(ratio) - self._log, -MOST_PULL), MOST_PULL)
        self._log += max(LEAST_SHARE, 1 / self.num_observed) * pull
