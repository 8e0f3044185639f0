"""One recipe that was tried: what became of it, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ...spec.errors import UsageError
from .space import Params

MEASURED, PRUNED, REFUSED, UNFINISHED = "measured", "pruned", "refused", "unfinished"
# Stages of a trial whose seconds are kept: compiling and the divergence on few tokens; the rounds.
JUDGE, MEASURE = "judge", "measure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One recipe. `state` is MEASURED, PRUNED (`reason` says by which estimate), REFUSED (`reason` is the
    compiler's) or UNFINISHED (time ran out; it is tried again). `values` are sizes in bytes, times in
    seconds, `slowness` the time per token over the unquantised model's; a trial that was not measured has
    what was known of it. `seconds` are by stage. `violation` is 0 for what keeps to all limits, and grows
    with the share by which a limit is broken."""

    name: str
    params: Params
    state: str
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    violation: float = 0.0
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a recipe must keep to: mean KL divergence in nats, bytes, seconds. None is no limit."""

    kl: float | None = None
    size: float | None = None
    ttft: float | None = None
    tpot: float | None = None

    def validate(self) -> None:
        """Raises UsageError for a limit that nothing can keep to."""
        for name, value in self.given().items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(
                    "search.limit",
                    f"The limit {name} is {value}.",
                    "It must be a number above 0.",
                    "Choose another.",
                )

    def given(self) -> dict[str, float]:
        """The limits that there are, by name."""
        limits: dict[str, float | None] = asdict(self)
        return {name: value for name, value in limits.items() if value is not None}

    def broken(self, values: Mapping[str, float]) -> dict[str, float]:
        """By how large a share known values are beyond a limit, by its name; values not known break none."""
        keys = {"kl": "kl_mean", "size": "size_bytes", "ttft": "ttft_s", "tpot": "tpot_s"}
        return {
            name: values[keys[name]] / limit - 1
            for name, limit in self.given().items()
            if values.get(keys[name], 0.0) > limit
        }


def told_slowness(values: Mapping[str, float]) -> float:
    """The time per token over the unquantised model's; 1 where the interval holds 1."""
    return 1.0 if values["slowness_low"] <= 1.0 <= values["slowness_high"] else values["slowness"]
