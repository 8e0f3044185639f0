"""Results of a bench on a terminal: tables, and bars for what has a shape. Draws, computes nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_BAR = 36
_SPREADS = (
    ("ttft_s", "time to first token", 1000.0, "ms"),
    ("tpot_s", "time per output token", 1000.0, "ms"),
    ("itl_s", "between events", 1000.0, "ms"),
    ("e2e_s", "whole request", 1000.0, "ms"),
    ("client_lag_s", "late in the client", 1000.0, "ms"),
    ("prefill_tokens_per_s", "prefill, one request", 1.0, "tok/s"),
    ("decode_tokens_per_s", "decode, one request", 1.0, "tok/s"),
)


def show_run(result: dict[str, Any]) -> RenderableType:
    """Latency and throughput: what was done, and how long it took."""
    head = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("requests", f"{result['requests']}, {result['errors']} of them failed"),
        ("tokens", f"{result['prompt_tokens']} in, {result['output_tokens']} out"),
        (
            "output",
            f"{result['output_tokens_per_s']:.1f} tok/s, {result['total_tokens_per_s']:.1f} with input",
        ),
        ("requests/s", f"{result['requests_per_s']:.2f}, good {result['goodput_per_s']:.2f}"),
        ("prefix hits", f"{100 * result['prefix_hit_rate']:.1f} %"),
    ):
        head.add_row(name, value)
    if result.get("bandwidth_fraction") is not None:
        head.add_row("weights read", f"{100 * result['bandwidth_fraction']:.0f} % of the memory's speed")
    parts: list[RenderableType] = [head, "", _spreads(result)]
    parts += [Text(f"error, {count} times: {kind}", "red") for kind, count in result["error_kinds"].items()]
    if result["saturation"]:
        parts.append(Text(f"over-saturated: {result['saturation']}", "red"))
    return Group(*parts)


def show_sweep(result: dict[str, Any]) -> RenderableType:
    """A row per rate; the bars are goodput against the highest."""
    table = Table(box=None, pad_edge=False)
    for name in ("rate/s", "good/s", "out tok/s", "TTFT p50", "p99", "TPOT p50", "p99", ""):
        table.add_column(name, justify="left" if not name else "right")
    top = max((row["goodput_per_s"] for row in result["rows"]), default=0.0) or 1.0
    for row in result["rows"]:
        ttft, tpot = row["ttft_s"], row["tpot_s"]
        mark = " over-saturated" if row["saturation"] else ""
        table.add_row(
            f"{row['rate_per_s']:.2f}",
            f"{row['goodput_per_s']:.2f}",
            f"{row['output_tokens_per_s']:.0f}",
            *(f"{1000 * each[p]:.0f} ms" if each else "–" for each in (ttft, tpot) for p in ("p50", "p99")),
            Text("█" * round(_BAR * row["goodput_per_s"] / top), "cyan").append(mark, "red"),
        )
    knee = result["knee_per_s"]
    said = "no rate was good" if knee is None else f"the knee is at {knee:.2f} requests/s"
    return Group(table, "", said)


def show_start(result: dict[str, Any]) -> RenderableType:
    """Where the time of a start went."""
    table = Table(show_header=False, box=None, pad_edge=False)
    total = sum(result["ledger"].values()) or 1.0
    for step, seconds in result["ledger"].items():
        table.add_row(step, f"{seconds:.3f} s", Text("█" * round(_BAR * seconds / total), "cyan"))
    table.add_row("ready", f"{result['ready_s']:.3f} s", f"ledgers within {100 * result['ledger_gap']:.1f} %")
    return table


def _spreads(result: dict[str, Any]) -> Table:
    """Percentiles in a table; the bar goes from p50 to p99 on the scale of the row's p99."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "mean", "p50", "p90", "p99", "unit", "p50 ─ p90 ┄ p99"):
        table.add_column(name, justify="left" if name in ("", "unit") or "─" in name else "right")
    for key, name, scale, unit in _SPREADS:
        spread = result.get(key)
        if spread is None:
            continue
        values = [spread[each] * scale for each in ("mean", "p50", "p90", "p99")]
        top = values[3] or 1.0
        middle, high = (round(_BAR * value / top) for value in values[1:3])
        bar = "█" * middle + "─" * (high - middle) + "┄" * (_BAR - high)
        table.add_row(name, *(f"{value:.1f}" for value in values), unit, Text(bar, "cyan"))
    return table
