"""Whether drafting pays, and how many tokens: pure arithmetic over measured seconds and the share of drafts
that were accepted. A decision changes when tokens come, never which."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# Drafting must promise this much more speed than plain decoding, since the promise is an estimate.
MARGIN = 1.03
# Where it does not pay by what was accepted so far, one step in so many tries again.
PROBE_STEPS = 100
# What is believed of the first drafts, as so many of them at this share; and how slowly it is forgotten.
_PRIOR_SHARE, _PRIOR_WEIGHT = 0.7, 8.0
_MEMORY = 256.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a count, measured at some counts, straight lines between and beyond them. `points` are
    (count, seconds) by ascending count; without any the seconds are 0."""

    points: tuple[tuple[int, float], ...] = ()

    def at(self, count: int) -> float:
        """Seconds at `count`."""
        points = self.points
        if len(points) < 2:
            return points[0][1] * max(1.0, count / points[0][0]) if points else 0.0
        place = min(max(1, bisect_left(points, (count, 0.0))), len(points) - 1)
        (low, low_s), (high, high_s) = points[place - 1], points[place]
        return max(0.0, low_s + (high_s - low_s) * (count - low) / (high - low))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCosts:
    """Seconds of a step by what is in it: `decode` for so many requests with a token each, `verify` for one
    request with so many tokens, `draft` for one drafted token of so many requests."""

    decode: Curve
    verify: Curve
    draft: Curve = Curve()

    def step_s(self, num_requests: int, num_tokens: int) -> float:
        """A step in which `num_requests` requests have `num_tokens` tokens together: what so many tokens of
        one request take, and what the other requests add beyond their tokens."""
        extra = max(0.0, self.decode.at(num_requests) - self.verify.at(num_requests))
        return self.verify.at(num_tokens) + extra


class Acceptance:
    """How often a draft at each place is accepted, given that those before it were. What is long ago counts
    less and less."""

    def __init__(self, most: int) -> None:
        self._tried = [_PRIOR_WEIGHT] * most
        self._accepted = [_PRIOR_WEIGHT * _PRIOR_SHARE] * most

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Of `num_drafted` drafts of one request the first `num_accepted` were accepted."""
        for place in range(min(num_drafted, num_accepted + 1, len(self._tried))):
            if self._tried[place] >= _MEMORY:
                self._tried[place] *= 0.5
                self._accepted[place] *= 0.5
            self._tried[place] += 1.0
            self._accepted[place] += place < num_accepted

    def expected(self) -> list[float]:
        """Entry j is the number of accepted tokens to expect of j drafts."""
        sums, chance = [0.0], 1.0
        for tried, accepted in zip(self._tried, self._accepted, strict=True):
            chance *= accepted / tried
            sums.append(sums[-1] + chance)
        return sums


class DraftPolicy:
    """Decides how many tokens to draft, step by step. Without `costs` it is always as many as allowed."""

    def __init__(self, most: int, costs: SpeculationCosts | None = None) -> None:
        self.most = most
        self.acceptance = Acceptance(most)
        self._costs = costs
        self._steps_without = 0

    def choose(self, num_requests: int, lengths: Sequence[int] | None = None) -> int:
        """How many tokens to draft for each of `num_requests` requests that decode; 0 where none pays.
        `lengths` are the drafts at hand, of some of the requests, which cost nothing to make."""
        if not num_requests or lengths == ():
            return 0
        if self._costs is None:
            return self.most
        best = self._best(num_requests, lengths, self.acceptance.expected())
        if best:
            self._steps_without = 0
            return best
        self._steps_without += 1
        if self._steps_without < PROBE_STEPS:
            return 0
        self._steps_without = 0
        certain = [float(count) for count in range(self.most + 1)]
        return min(1, self._best(num_requests, lengths, certain))

    def _best(self, num_requests: int, lengths: Sequence[int] | None, expected: Sequence[float]) -> int:
        costs = self._costs
        assert costs is not None
        plain_s = costs.step_s(num_requests, num_requests)
        best, best_rate = 0, MARGIN * num_requests / plain_s if plain_s > 0 else 0.0
        for count in range(1, self.most + 1):
            used = [count] * num_requests if lengths is None else [min(count, length) for length in lengths]
            seconds = costs.step_s(num_requests, num_requests + sum(used))
            if lengths is None:
                seconds += count * costs.draft.at(num_requests)
            rate = (num_requests + sum(expected[each] for each in used)) / max(seconds, 1e-12)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
