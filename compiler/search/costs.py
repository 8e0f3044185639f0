"""How long a trial will take, from what those before it took. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .space import METHOD, Params
from .trial import JUDGE, MEASURE, Trial

# A trial may take this much longer than the longest of its method so far: its groups are smaller, or the
# machine is busier.
SAFETY = 1.25
# The same where no trial of its method is known: methods that calibrate take several times as long.
UNSEEN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a prediction starts from: `prepare_s` are the seconds that compiling the unquantised model, twice,
    and running it took, `rounds_s` those that the rounds of a measurement may take."""

    prepare_s: float
    rounds_s: float

    def judge_s(self, params: Params, trials: Sequence[Trial]) -> float:
        """Seconds to compile a recipe and to see its divergence on few tokens."""
        return _expected(JUDGE, params, trials, self.prepare_s)

    def measure_s(self, params: Params, trials: Sequence[Trial]) -> float:
        """Seconds to measure a recipe that is compiled."""
        return _expected(MEASURE, params, trials, UNSEEN * self.rounds_s)

    def trial_s(self, params: Params, trials: Sequence[Trial]) -> float:
        """Seconds of a whole trial."""
        return self.judge_s(params, trials) + self.measure_s(params, trials)


def _expected(stage: str, params: Params, trials: Sequence[Trial], proxy_s: float) -> float:
    """`proxy_s` where no trial is known at all."""
    seen = [(trial.params[METHOD], trial.seconds[stage]) for trial in trials if stage in trial.seconds]
    own = [seconds for method, seconds in seen if method == params[METHOD]]
    if own:
        return SAFETY * max(own)
    return UNSEEN * max(seconds for _, seconds in seen) if seen else proxy_s
