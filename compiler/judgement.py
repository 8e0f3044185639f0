"""How two models differ on text, in numbers with intervals: per-token values first, then their statistics.

Knows logits and tokens; knows neither programs nor files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_RESAMPLES = 1000
_BAND = 64  # rows compared at a time, in float64


class TokenValues(NamedTuple):
    """What is measured at each position of one window, `[T]` each; NaN where nothing follows. Without a
    reference all but `nll` are None."""

    nll: Tensor
    reference_nll: Tensor | None
    divergence: Tensor | None
    same_top: Tensor | None


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A model on `tokens` positions of `windows` windows of text, against a reference where there is one.

    Divergences are in nats, from the reference's distribution; `greedy_match` is the mean number of
    positions from the start of a window until the likeliest tokens first differ. Intervals come from
    resampling whole windows.
    """

    windows: int
    tokens: int
    perplexity: Interval
    reference_perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    kl_mean: Interval | None = None
    kl_p99: float | None = None
    same_top: Interval | None = None
    greedy_match: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The keys that other programs rely on, with intervals beside them."""
        found: dict[str, Any] = {}
        for name, value in asdict(self).items():
            entry = getattr(self, name)
            if isinstance(entry, Interval):
                found[name] = entry.value
                found[f"{name}_interval"] = [entry.low, entry.high]
            elif entry is not None:
                found[name] = value
        return found


def token_values(
    logits_TV: Tensor, token_ids: list[int], reference_TV: Tensor | None, first_counted: int
) -> TokenValues:
    """The values of one window; positions before `first_counted` are context only and left out."""
    following = torch.tensor([*token_ids[1:], -1])
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(first_counted, len(token_ids), _BAND):
        rows = slice(start, start + _BAND)
        own = torch.log_softmax(logits_TV[rows].double(), dim=-1)
        other = own if reference_TV is None else torch.log_softmax(reference_TV[rows].double(), dim=-1)
        parts.append(
            (
                _nll(own, following[rows]),
                _nll(other, following[rows]),
                (other.exp() * (other - own)).sum(-1).clamp_min(0),
                own.argmax(-1) == other.argmax(-1),
            )
        )
    nll, reference_nll, divergence, same = (torch.cat(column) for column in zip(*parts, strict=True))
    if reference_TV is None:
        return TokenValues(nll, None, None, None)
    return TokenValues(nll, reference_nll, divergence, same)


def judge_tokens(windows: list[TokenValues]) -> Judgement:
    """The statistics of all windows together."""
    nll = _Sums.of([window.nll for window in windows])
    tokens = sum(len(window.nll) for window in windows)
    perplexity = nll.interval(math.exp)
    if windows[0].divergence is None:
        return Judgement(windows=len(windows), tokens=tokens, perplexity=perplexity)
    reference = [window.reference_nll for window in windows if window.reference_nll is not None]
    divergence = [window.divergence for window in windows if window.divergence is not None]
    same = [window.same_top for window in windows if window.same_top is not None]
    differences = [own.nll - other for own, other in zip(windows, reference, strict=True)]
    return Judgement(
        windows=len(windows),
        tokens=tokens,
        perplexity=perplexity,
        reference_perplexity=_Sums.of(reference).interval(math.exp),
        perplexity_ratio=_Sums.of(differences).interval(math.exp),
        kl_mean=_Sums.of(divergence).interval(float),
        kl_p99=float(torch.cat(divergence).quantile(0.99)),
        same_top=_Sums.of([values.double() for values in same]).interval(float),
        greedy_match=sum(_matched(values) for values in same) / len(same),
    )


class _Sums(NamedTuple):
    """Sums and counts by window, NaN left out."""

    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, values: list[Tensor]) -> _Sums:
        sums = torch.stack([value.nansum() for value in values]).double()
        counts = torch.stack([(~value.isnan()).sum() for value in values]).double()
        return cls(sums, counts)

    def interval(self, shape: Any) -> Interval:
        """The mean over all positions and where it lies when windows are drawn again, through `shape`."""
        draw = torch.Generator().manual_seed(0)
        picks = torch.randint(len(self.sums), (_RESAMPLES, len(self.sums)), generator=draw)
        means = self.sums[picks].sum(1) / self.counts[picks].sum(1).clamp_min(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        mean = float(self.sums.sum() / self.counts.sum().clamp_min(1))
        return Interval(shape(mean), shape(low), shape(high))


def _nll(logprobs: Tensor, following: Tensor) -> Tensor:
    chosen = -logprobs.gather(1, following.clamp_min(0)[:, None])[:, 0]
    return chosen.masked_fill(following < 0, math.nan)


def _matched(same: Tensor) -> int:
    differing = (~same).nonzero()
    return int(differing[0]) if len(differing) else len(same)
