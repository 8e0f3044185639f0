"""What a reader of the status page wants to know of the last minutes: rates, percentiles, lengths. Times are
handed in; knows no HTTP."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .metric_table import TOKENS

WINDOW_S = 60
_SAMPLES = 2000


class Percentiles(NamedTuple):
    p50: float
    p90: float
    p99: float


def percentiles(samples: Iterable[float]) -> Percentiles | None:
    """The smallest samples that at least 50, 90 and 99 % do not exceed; None without any."""
    ordered = sorted(samples)
    if not ordered:
        return None
    return Percentiles(*(ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 90, 99)))


class Rate:
    """Counts by the second over the last `WINDOW_S` seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = int(clock())
        self._counts = [0] * WINDOW_S
        self._second = self._began

    def add(self, count: int) -> None:
        self._counts[self._now() % WINDOW_S] += count

    def history(self) -> list[int]:
        """Counts of the last whole seconds, oldest first; none from before the start."""
        now = self._now()
        first = max(self._began, now - WINDOW_S + 1)
        return [self._counts[second % WINDOW_S] for second in range(first, now)]

    def _now(self) -> int:
        """The second it is; those that have passed since the last look are emptied."""
        now = int(self._clock())
        for second in range(max(self._second + 1, now - WINDOW_S + 1), now + 1):
            self._counts[second % WINDOW_S] = 0
        self._second = now
        return now


class Lengths:
    """How many texts had how many tokens, in the metrics' buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TOKENS) + 1)

    def add(self, num_tokens: int) -> None:
        self._counts[bisect_left(TOKENS, num_tokens)] += 1

    def bars(self) -> list[tuple[int, int]]:
        """(upper bound in tokens, texts) from the first to the last bucket that is not empty."""
        used = [place for place, count in enumerate(self._counts[:-1]) if count]
        if not used:
            return []
        return [(int(TOKENS[place]), self._counts[place]) for place in range(used[0], used[-1] + 1)]


class Recent:
    """The last minutes of one model."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tokens = Rate(clock)
        self.prompt_tokens = Rate(clock)
        self.ttft_s: deque[float] = deque(maxlen=_SAMPLES)
        self.itl_s: deque[float] = deque(maxlen=_SAMPLES)
        self.prompt_lengths = Lengths()
        self.output_lengths = Lengths()
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_finished = 0
        self.num_refused = 0
