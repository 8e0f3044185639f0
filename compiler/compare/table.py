"""The columns of a comparison: what each is called, its unit, which way is better, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """`key` is its name in JSON; less is better where `less`, more where not; `write` makes text of it."""

    key: str
    title: str
    less: bool
    write: Callable[[float], str]


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _ms(value: float) -> str:
    return f"{1000 * value:.2f} ms"


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COLUMNS: tuple[Column, ...] = (
    Column(key="bits_per_weight", title="bits/weight", less=True, write=_number(2)),
    Column(key="size_bytes", title="size", less=True, write=_bytes),
    Column(key="peak_bytes", title="peak memory", less=True, write=_bytes),
    Column(key="load_s", title="load", less=True, write=lambda value: f"{value:.2f} s"),
    Column(key="perplexity", title="perplexity", less=True, write=_number(3)),
    Column(key="kl_mean", title="KL", less=True, write=lambda value: f"{value:.3g}"),
    Column(key="kl_p99", title="KL p99", less=True, write=lambda value: f"{value:.3g}"),
    Column(key="same_top", title="same top", less=False, write=_percent),
    Column(key="ttft_s", title="TTFT", less=True, write=_ms),
    Column(key="tpot_s", title="TPOT", less=True, write=_ms),
    Column(key="prefill_tokens_per_s", title="prefill tok/s", less=False, write=_number(0)),
    Column(key="decode_tokens_per_s", title="decode tok/s", less=False, write=_number(1)),
    Column(key="throughput_tokens_per_s", title="throughput tok/s", less=False, write=_number(0)),
    Column(key="goodput_per_s", title="goodput req/s", less=False, write=_number(2)),
    Column(key="cost_per_million", title="cost per 1M", less=True, write=lambda value: f"{value:.4g}"),
)
# Columns whose ratio to the baseline was measured round by round.
MEASURED = ("ttft_s", "tpot_s", "throughput_tokens_per_s")
