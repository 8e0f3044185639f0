"""Who is let in: bounds on sequences, over all callers and per key, and how long to stay away when one is
reached. Arithmetic over counts and an injected clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ServingError

MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0
_WINDOW = 256


@dataclass(slots=True, eq=False)
class Place:
    """What one request holds until `Backlog.leave`."""

    key: str
    num_sequences: int
    is_held: bool = True


class Backlog:
    """Counts sequences that run or wait.

    At most `max_sequences` at a time, and `max_per_key` of one key (None: any). The advice when to come back
    is the number of sequences that must end first, over the rate at which the last ones have ended; time
    in which nothing ran does not count.
    """

    def __init__(self, max_sequences: int, max_per_key: int | None, clock: Callable[[], float]) -> None:
        self.max_sequences = max_sequences
        self.max_per_key = max_per_key
        self._clock = clock
        self._by_key: Counter[str] = Counter()
        self._endings: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._busy_s = 0.0
        self._busy_since: float | None = None

    @property
    def num_sequences(self) -> int:
        """Those that are in."""
        return self._by_key.total()

    def enter(self, key: str, num_sequences: int) -> Place:
        """Lets a request in. 429 when its key has too much running already, 503 when the server has."""
        of_key = self._by_key[key]
        limit = self.max_per_key
        if limit is not None and of_key + num_sequences > limit:
            raise ServingError(
                429,
                "limit.concurrency",
                f"This key has {of_key} sequences running or waiting, and asks for {num_sequences} more.",
                f"A key may have {limit} at a time.",
                "Wait for some to end, or send fewer at once.",
                retry_after_s=self.retry_after_s(of_key + num_sequences - limit, of_key),
            )
        total = self.num_sequences
        if total + num_sequences > self.max_sequences:
            raise ServingError(
                503,
                "server.overloaded",
                f"The server has {total} sequences running or waiting.",
                f"It takes {self.max_sequences} at a time.",
                "Try again after the time in Retry-After.",
                retry_after_s=self.retry_after_s(total + num_sequences - self.max_sequences, total),
            )
        if not total:
            self._busy_since = self._clock()
        self._by_key[key] += num_sequences
        return Place(key, num_sequences)

    def leave(self, place: Place) -> None:
        """Gives the place back. A second time changes nothing."""
        if not place.is_held:
            return
        place.is_held = False
        self._endings.append((self._busy_now_s(), place.num_sequences))
        self._by_key[place.key] -= place.num_sequences
        if not self._by_key[place.key]:
            del self._by_key[place.key]
        if not self.num_sequences:
            self._busy_s, self._busy_since = self._busy_now_s(), None

    def retry_after_s(self, num_excess: int, num_among: int) -> float:
        """Seconds until `num_excess` of `num_among` sequences have probably ended."""
        rate = self._rate_per_s()
        total = max(self.num_sequences, 1)
        if rate is None:
            return MIN_RETRY_S
        share = min(1.0, max(num_among, 1) / total)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, num_excess / (rate * share)))

    def _rate_per_s(self) -> float | None:
        """Sequences that end in a busy second; None before the first has."""
        if not self._endings:
            return None
        first_s = self._endings[0][0] if len(self._endings) == _WINDOW else 0.0
        seconds = max(self._busy_now_s() - first_s, 1e-3)
        return sum(count for _, count in self._endings) / seconds

    def _busy_now_s(self) -> float:
        since = self._busy_since
        return self._busy_s + (0.0 if since is None else self._clock() - since)
