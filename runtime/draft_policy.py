"""Whether drafting pays, and how many tokens: pure arithmetic over measured seconds and the share of drafts
that were accepted. A decision changes when tokens come, never which."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .pace import Pace

# Drafting must promise this much more speed than plain decoding, since the promise is an estimate: the first
# to go on, the second to begin again once it did not pay, so that what is about even does not come and go.
MARGIN, MARGIN_TO_BEGIN = 1.05, 1.08
# Where it does not pay by what was accepted so far, it is tried again after so many steps; each time that it
# then does not for some steps, after twice as many, up to the second number: to begin costs a draft model a
# few steps' time.
PROBE_STEPS, MOST_PROBE_STEPS, LASTING = 100, 1600, 16
# Steps of one trial. In the first ones a draft model catches up, and caches hold little of it: they say
# nothing of what drafting costs.
PROBE_RUN, UNTYPICAL = 4, 2
# Drafts are judged by no fewer steps, since a draft model that was not called may be slow for the first few.
FEWEST_DRAFTED = 5
# What each other step of a trial counts for, since there are few: those before it may be long ago.
PROBE_SHARE = 0.25
# A draft model reads all of a request before its first draft: a trial waits for one of at most so many
# tokens, until so many times as many steps have passed.
PROBE_TOKENS, PROBE_PATIENCE = 64, 4
# Of so many steps the last few go without drafts while they pay, to see what plain steps take by now. The
# first of them does not count: on a processor whose caches hold what drafting left it takes a fifth longer.
PLAIN_EVERY, PLAIN_RUN = 128, 4
# The first of them come after so many drafted ones of about as many requests: until then what slows down both
# is not known, and drafts are not judged.
PLAIN_FIRST = 8
# Decisions change when what drafted steps take does by more than this.
_NOTABLE = 0.02
# What is best for a draft model is asked again when so many more drafts were told of, for each request:
# asking each time takes a hundredth of a small model's step.
_STANDING = 8
# What is believed of the first drafts, as so many of them at this share; and how slowly it is forgotten.
_PRIOR_SHARE, _PRIOR_WEIGHT = 0.7, 8.0
_MEMORY = 128.0
# Steps whose seconds are remembered, which is cheaper than to work them out again.
_MOST_KEPT = 4096


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
    request with so many tokens, `draft` for one drafted token of so many requests, and `draft_call` for what
    comes before the first of them: the draft model reads what was accepted."""

    decode: Curve
    verify: Curve
    draft: Curve = Curve()
    draft_call: Curve = Curve()

    def draft_s(self, num_requests: int, num_drawn: int) -> float:
        """Drafting `num_drawn` tokens for each of `num_requests` requests."""
        if not num_drawn:
            return 0.0
        return self.draft_call.at(num_requests) + num_drawn * self.draft.at(num_requests)

    def step_s(self, num_requests: int, num_tokens: int) -> float:
        """A step in which `num_requests` requests have `num_tokens` tokens together: what so many tokens of
        one request take, and what the other requests add beyond their tokens."""
        extra = max(0.0, self.decode.at(num_requests) - self.verify.at(num_requests))
        return self.verify.at(num_tokens) + extra


class Acceptance:
    """How often a draft at each place is accepted, given that those before it were. What is long ago counts
    less and less."""

    def __init__(self, most: int) -> None:
        self.num_observed = 0
        self._tried = [_PRIOR_WEIGHT] * most
        self._accepted = [_PRIOR_WEIGHT * _PRIOR_SHARE] * most

    def observe(self, num_drafted: int, num_accepted: int, times: int = 1) -> None:
        """Of `num_drafted` drafts the first `num_accepted` were accepted, in `times` requests."""
        self.num_observed += times
        for place in range(min(num_drafted, num_accepted + 1, len(self._tried))):
            if self._tried[place] >= _MEMORY:
                self._tried[place] *= 0.5
                self._accepted[place] *= 0.5
            self._tried[place] += times
            self._accepted[place] += times if place < num_accepted else 0

    def expected(self) -> list[float]:
        """Entry j is the number of accepted tokens to expect of j drafts."""
        sums, chance = [0.0], 1.0
        for tried, accepted in zip(self._tried, self._accepted, strict=True):
            chance *= accepted / tried
            sums.append(sums[-1] + chance)
        return sums


@dataclass(frozen=True, slots=True)
class _Excess:
    """Drafted steps that were expected to take `expected_s` took `factor` times as long."""

    factor: float
    expected_s: float

    def applied(self, expected_s: float) -> float:
        """What a step then takes. What comes on top does not grow with the number of drafts: most of it comes
        before and behind each step."""
        if self.factor <= 1.0:
            return expected_s * self.factor
        return expected_s + (self.factor - 1.0) * min(expected_s, self.expected_s)


_AS_TOLD = _Excess(1.0, 0.0)


class DraftPolicy:
    """Decides how many tokens to draft, step by step. Without `costs` it is always as many as allowed.

    `costs` were measured before the first step. What steps take since then corrects them: drafted ones
    against plain ones of about as many requests, so that what slows down both changes nothing.
    """

    def __init__(self, most: int, costs: SpeculationCosts | None = None) -> None:
        self.most = most
        self.acceptance = Acceptance(most)
        self.is_probe = False
        self._costs = costs
        self._seconds: dict[tuple[int, int, int, int], float] = {}
        self._hopes: dict[tuple[int, bool], bool] = {}
        self._answers: dict[tuple[int, bool], int] = {}  # of `_best` until some more was observed
        self._answered_at = 0
        self._steps_without = 0
        self._steps_with = 0
        self._probe_steps = PROBE_STEPS
        self._probe_left = 0
        self._num_in_run = 0  # steps since drafts began to pay
        self._was_drafted = False
        self._num_alike = UNTYPICAL  # steps since drafted and plain ones last took turns
        self._plain: dict[int, Pace] = {}  # by the size of the number of requests
        self._drafted: dict[int, Pace] = {}
        self._told: dict[int, _Excess] = {}  # of `_drafted`, what decisions are made by

    def can_pay(self, num_requests: int, is_free: bool) -> bool:
        """Whether drafting for all or some of `num_requests` requests would pay if every draft were accepted.
        Where not, there is no need to look for drafts."""
        if self._costs is None:
            return True
        key = (num_requests, is_free)
        found = self._hopes.get(key)
        if found is None:
            certain = [float(count) for count in range(self.most + 1)]
            some = [(self.most,) * count for count in range(1, num_requests + 1)] if is_free else [None]
            found = self._hopes[key] = any(
                self._best(num_requests, each, certain, hopes=True) for each in some
            )
        return found

    def steps_of(self, seconds: float, num_requests: int) -> int:
        """How many plain steps of `num_requests` requests take `seconds`, rounded up; one without costs."""
        if self._costs is None:
            return 1
        return math.ceil(seconds / max(self._step_s(num_requests, num_requests, 0, 0), 1e-9))

    @property
    def is_off(self) -> bool:
        """Whether drafts did not pay when it was last asked."""
        return self._steps_without > 0

    @property
    def steps_to_trial(self) -> int:
        """How many steps go without drafts before one tries them, once there is a short request."""
        return max(0, self._probe_steps - self._steps_without - 1)

    def choose(self, num_requests: int, lengths: Sequence[int] | None = None, shortest: int = 0) -> int:
        """How many tokens to draft for each of `num_requests` requests that decode; 0 where none pays.
        `lengths` are the drafts at hand, of some of the requests, which cost nothing to make. `is_probe` says
        whether what is chosen is not expected to pay, and one request is enough to learn from: the one with
        `shortest` tokens."""
        self.is_probe = False
        if not num_requests or lengths == ():
            return 0
        if self._costs is None:
            return self.most
        best = self._expected_best(num_requests, lengths)
        if best:
            if self.is_off and num_requests.bit_length() in self._drafted:
                self._drafted[num_requests.bit_length()].restart()
            self._num_in_run += 1
            self._steps_without, self._probe_left = 0, 0
            if self._num_in_run >= LASTING:
                self._probe_steps = PROBE_STEPS
            if num_requests.bit_length() not in self._plain:
                self._plain[num_requests.bit_length()] = Pace()
                self._steps_with = max(self._steps_with, PLAIN_EVERY - PLAIN_RUN - PLAIN_FIRST)
            place, self._steps_with = self._steps_with, (self._steps_with + 1) % PLAIN_EVERY
            return best if place < PLAIN_EVERY - PLAIN_RUN else 0
        self.skip()
        self._num_in_run = 0
        patience = 1 if shortest <= PROBE_TOKENS else PROBE_PATIENCE
        if self._steps_without >= patience * self._probe_steps:
            self._steps_without, self._probe_steps = 0, min(2 * self._probe_steps, MOST_PROBE_STEPS)
            certain = [float(count) for count in range(self.most + 1)]
            hopes = self._best(num_requests, lengths, certain, hopes=True)
            self._probe_left = PROBE_RUN if hopes else 0
            if lengths is None and num_requests.bit_length() in self._drafted:
                self._drafted[num_requests.bit_length()].relax()
        self.is_probe = self._probe_left > 0
        self._probe_left = max(0, self._probe_left - 1)
        return int(self.is_probe)

    def observe_step(
        self, num_requests: int, num_tokens: int, num_asked: int, num_drawn: int, seconds: float
    ) -> None:
        """A step of `num_requests` requests with `num_tokens` tokens, drafts included, took `seconds`; before
        it, `num_drawn` tokens were drafted for each of `num_asked` requests."""
        is_drafted = num_tokens > num_requests
        self._num_alike = self._num_alike + 1 if is_drafted == self._was_drafted else 1
        self._was_drafted = is_drafted
        num_untypical = 1 if not is_drafted else UNTYPICAL if num_drawn else 0
        if self._costs is None or seconds <= 0 or self._num_alike <= num_untypical:
            return
        expected_s = self._step_s(num_requests, num_tokens, num_asked, num_drawn)
        size = num_requests.bit_length()
        plain = self._plain.get(size)
        if plain is None:
            plain = self._plain[size] = Pace()
        if not is_drafted:
            if expected_s > 0 and not num_drawn:
                plain.observe(seconds / expected_s)
            return
        if not plain.is_known:
            return
        drafted = self._drafted.get(size)
        if drafted is None:
            drafted = self._drafted[size] = Pace(FEWEST_DRAFTED)
        if expected_s > 0:
            ratio = seconds / (expected_s * plain.factor)
            if not self.is_off:
                drafted.observe(ratio)
            elif not num_drawn or ratio < drafted.factor:
                # Each call of a draft model that is seldom called takes longer than one of many.
                drafted.observe(ratio, PROBE_SHARE)
        self._tell(size, expected_s)

    def _tell(self, size: int, expected_s: float) -> None:
        """Decides by what was observed of drafted steps, where that has changed."""
        drafted = self._drafted[size]
        if abs(drafted.factor / self._told.get(size, _AS_TOLD).factor - 1) > _NOTABLE:
            self._told[size] = _Excess(drafted.factor, expected_s)
            self._answers.clear()
            self._hopes.clear()

    def skip(self) -> None:
        """A step passed without drafts."""
        self._steps_without += 1

    def _expected_best(self, num_requests: int, lengths: Sequence[int] | None) -> int:
        """What is best by what was accepted so far."""
        margin = MARGIN_TO_BEGIN if self.is_off else MARGIN
        if lengths is not None:
            return self._best(num_requests, lengths, self.acceptance.expected(), margin)
        if self.acceptance.num_observed >= self._answered_at + _STANDING * num_requests:
            self._answers.clear()
            self._answered_at = self.acceptance.num_observed
        best = self._answers.get((num_requests, self.is_off))
        if best is None:
            best = self._best(num_requests, None, self.acceptance.expected(), margin)
            self._answers[num_requests, self.is_off] = best
        return best

    def _best(
        self,
        num_requests: int,
        lengths: Sequence[int] | None,
        expected: Sequence[float],
        margin: float = MARGIN,
        *,
        hopes: bool = False,
    ) -> int:
        """The number of drafts that promises most, at least `margin` times what none do. Who `hopes` believes
        the table where steps took longer."""
        excess = self._told.get(num_requests.bit_length(), _AS_TOLD)
        if hopes and excess.factor > 1.0:
            excess = _AS_TOLD
        plain_s = self._step_s(num_requests, num_requests, 0, 0)
        best, best_rate = 0, margin * num_requests / plain_s if plain_s > 0 else 0.0
        at_hand = Counter(lengths or ())
        for count in range(1, self.most + 1):
            if lengths is None:
                num_drafted, num_expected = count * num_requests, num_requests * expected[count]
            else:
                num_drafted = sum(times * min(count, length) for length, times in at_hand.items())
                num_expected = sum(times * expected[min(count, length)] for length, times in at_hand.items())
            num_drawn = count if lengths is None else 0
            seconds = self._step_s(num_requests, num_requests + num_drafted, num_requests, num_drawn)
            rate = (num_requests + num_expected) / max(excess.applied(seconds), 1e-12)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _step_s(self, num_requests: int, num_tokens: int, num_asked: int, num_drawn: int) -> float:
        """A step of `num_tokens` tokens, and the `num_drawn` drafted for each of `num_asked` requests before
        it."""
        key = (num_requests, num_tokens, num_asked, num_drawn)
        seconds = self._seconds.get(key)
        if seconds is None:
            costs = self._costs
            assert costs is not None
            seconds = costs.step_s(num_requests, num_tokens) + costs.draft_s(num_asked, num_drawn)
            if len(self._seconds) < _MOST_KEPT:
                self._seconds[key] = seconds
        return seconds
