"""How long steps take against what a table says of them, learnt from each step. Arithmetic over ratios; no
clock."""

from __future__ import annotations

import math
import statistics

# The share that one step has in what is believed, once many were seen; how far one pulls, in logarithms, as a
# disturbed step takes many times as long as others; and of how many at first, from how many on, the middle
# one is believed, so that a disturbed one does not decide.
LEAST_SHARE = 0.05
MOST_PULL = 0.7
FEWEST, FIRST = 3, 7


class Pace:
    """A running mean of ratios, measured seconds over expected ones. 1 until `fewest` were observed."""

    def __init__(self, fewest: int = FEWEST) -> None:
        self._fewest = fewest
        self._first: list[float] = []
        self._log = 0.0
        self.factor = 1.0  # what to multiply expected seconds with

    @property
    def is_known(self) -> bool:
        """Whether enough was observed to say anything."""
        return len(self._first) >= self._fewest

    def observe(self, ratio: float, share: float = LEAST_SHARE) -> None:
        """One more step, and what it counts for; `ratio` is positive."""
        if len(self._first) < FIRST:
            self._first.append(math.log(ratio))
            if self.is_known:
                self._believe(statistics.median(self._first))
            return
        pull = math.log(ratio) - self._log
        self._believe(self._log + share * min(max(pull, -MOST_PULL), MOST_PULL))

    def relax(self) -> None:
        """What made steps slower is long ago: half of it is believed."""
        self._believe(min(self._log, 0.5 * self._log))

    def restart(self) -> None:
        """The middle one of the next few is believed again."""
        self._first.clear()

    def _believe(self, log: float) -> None:
        self._log, self.factor = log, math.exp(log)
