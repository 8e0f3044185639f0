"""From samples to numbers, by the definitions of `vllm bench serve`. Arithmetic alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .client import Sample

_THIRD = 3
_MIN_JUDGED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request must meet to count as good, in seconds; None: anything."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def are_met(self, sample: Sample) -> bool:
        """Whether a request that ended well meets all of them."""
        pairs = ((self.ttft_s, sample.ttft_s), (self.tpot_s, sample.tpot_s), (self.e2e_s, sample.e2e_s))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles by nearest rank, and the mean."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """One run. `wall_s` is from the first request due to the last event. `client_lag_s` is what requests
    of an open-loop run waited in the client beyond the time they were due: it is in no other number.
    `saturation` says in what
    way an open-loop run was more than the server could do; None where it was not."""

    requests: int
    errors: int
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hit_rate: float
    ttft_s: Spread | None
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    client_lag_s: Spread | None
    error_kinds: dict[str, int]
    saturation: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(samples: Sequence[Sample], limits: Limits, rate_per_s: float | None = None) -> Measures:
    """The numbers of one run; `rate_per_s` is the offered rate of an open-loop run."""
    good = [sample for sample in samples if sample.error is None]
    wall_s = max((sample.event_s[-1] for sample in good), default=0.0)
    seconds = max(wall_s, 1e-9)
    prompt = sum(sample.num_prompt_tokens for sample in good)
    output = sum(sample.num_output_tokens for sample in good)
    cached = sum(sample.num_cached_tokens for sample in good)
    gaps = [b - a for sample in good for a, b in zip(sample.event_s, sample.event_s[1:], strict=False)]
    return Measures(
        requests=len(samples),
        errors=len(samples) - len(good),
        wall_s=wall_s,
        requests_per_s=len(good) / seconds,
        output_tokens_per_s=output / seconds,
        total_tokens_per_s=(prompt + output) / seconds,
        goodput_per_s=sum(map(limits.are_met, good)) / seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        prefix_hit_rate=cached / prompt if prompt else 0.0,
        ttft_s=spread([sample.ttft_s for sample in good]),
        tpot_s=spread([sample.tpot_s for sample in good if sample.tpot_s is not None]),
        itl_s=spread(gaps),
        e2e_s=spread([sample.e2e_s for sample in good]),
        client_lag_s=(
            None
            if rate_per_s is None
            else spread([max(0.0, sample.sent_s - sample.scheduled_s) for sample in good])
        ),
        error_kinds=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        saturation=None if rate_per_s is None else find_saturation(samples, rate_per_s),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p99 = (ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 90, 99))
    return Spread(mean=statistics.fmean(ordered), p50=p50, p90=p90, p99=p99)


def find_saturation(samples: Sequence[Sample], rate_per_s: float) -> str | None:
    """Whether work came faster than it was done: requests were turned away for load; or fewer than 90 % of
    the offered requests a second were finished while they came, and either half as many again were under way
    at the last arrival as half way there, or the first token took twice as long for the last third of the
    requests as for the first. Numbers of such a run depend on its length."""
    turned_away = sum(sample.status in (429, 503) for sample in samples)
    if turned_away:
        return f"{turned_away} of {len(samples)} requests were turned away for load"
    good = sorted((s for s in samples if s.error is None), key=lambda sample: sample.scheduled_s)
    if len(good) < _MIN_JUDGED:
        return None
    third = len(good) // _THIRD
    first = statistics.median(sample.ttft_s for sample in good[:third])
    last = statistics.median(sample.ttft_s for sample in good[-third:])
    window_s = max(good[-1].scheduled_s, 1e-9)
    done = sum(sample.event_s[-1] <= window_s for sample in good) / window_s
    if done >= 0.9 * rate_per_s:
        return None
    half, end = (_num_under_way(good, at_s) for at_s in (window_s / 2, window_s))
    if end > 1.5 * half:
        return (
            f"{end} requests were under way when the last one came, {half} half way there: more came than "
            "were finished, or the run was too short to tell"
        )
    if last > 2 * first:
        return (
            f"{done:.2f} of {rate_per_s:.2f} requests/s were finished while they came, and the median time "
            f"to the first token grew from {first:.3f} to {last:.3f} s"
        )
    return None


def _num_under_way(samples: Sequence[Sample], at_s: float) -> int:
    return sum(sample.sent_s <= at_s < sample.event_s[-1] for sample in samples)
