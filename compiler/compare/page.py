"""The comparison as one self-contained HTML page: table, plots, texts; for phones, dark and light."""

from __future__ import annotations

from html import escape

from ..page.frame import document, section
from ..page.plots import bars, curve_plot, heat_map, scatter
from .compare import Comparison, Row, columns_of
from .table import Column
from .words import advice, ratio_text


def comparison_page(comparison: Comparison) -> str:
    """The page. It loads nothing from anywhere."""
    rows = comparison.rows
    title = f"Comparison of {len(rows)} configurations"
    facts = (
        f"{comparison.rounds} interleaved rounds of {comparison.num_tokens} tokens, batches of "
        f"{comparison.concurrency}; quality on {comparison.quality_tokens} tokens against "
        f"{comparison.reference}; ratios to {comparison.baseline}."
    )
    parts = [
        f"<p class='lead'>{escape(advice(comparison))}</p><p>{escape(facts)}</p>",
        section("Numbers", _table(comparison)),
        section("Quality against speed", _quality_plot(comparison, "tpot_s", "milliseconds per token", 1e3)),
        section("Quality against size", _quality_plot(comparison, "size_bytes", "MiB on disk", 1 / 2**20)),
        section("Latency", _latency(rows)),
        section("Where the error enters", _layers(rows)),
        section("Where texts part", _texts(comparison)),
    ]
    return document(title, "".join(parts))


def _table(comparison: Comparison) -> str:
    columns = columns_of(comparison)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    body = "".join(_table_row(comparison, row, columns) for row in comparison.rows)
    note = "<p>★ no other configuration is at least as good in quality, size and speed and better in one.</p>"
    return f"<div class='scroll'><table><tr><th>name</th>{head}</tr>{body}</table></div>{note}"


def _table_row(comparison: Comparison, row: Row, columns: list[Column]) -> str:
    star = " ★" if row.name in comparison.pareto else ""
    cells: list[str] = []
    for column in columns:
        value = row.values.get(column.key)
        text = "–" if value is None else column.write(value)
        ratio = row.ratios.get(column.key)
        told = "" if ratio is None or row.name == comparison.baseline else ratio_text(ratio)
        cells.append(f"<td>{escape(text)}<small>{escape(told)}</small></td>")
    return f"<tr><th>{escape(row.name)}{star}</th>{''.join(cells)}</tr>"


def _quality_plot(comparison: Comparison, key: str, unit: str, scale: float) -> str:
    points = [
        (row.name, row.values[key] * scale, row.values["kl_mean"], row.name in comparison.pareto)
        for row in comparison.rows
    ]
    return scatter(points, x_title=unit, y_title="mean KL divergence, nats")


def _latency(rows: tuple[Row, ...]) -> str:
    curves = "".join(
        curve_plot([(row.name, [1e3 * value for value in row.latencies[key]]) for row in rows], title)
        for key, title in (
            ("ttft_s", "time to first token, milliseconds"),
            ("tpot_s", "time per token, milliseconds"),
        )
    )
    told = "<p>The share of requests, one at a time, that took no longer: further left is faster.</p>"
    rates = [(row.name, row.values["throughput_tokens_per_s"]) for row in rows]
    return told + curves + bars("throughput, tokens/s", rates)


def _layers(rows: tuple[Row, ...]) -> str:
    labels = [f"layer {index}" for index in range(len(rows[0].layers) - 1)] + ["logits"]
    return heat_map([(row.name, row.layers) for row in rows], labels, unit="relative error")


def _texts(comparison: Comparison) -> str:
    parts: list[str] = []
    for row in comparison.rows:
        if row.name == comparison.baseline:
            continue
        if row.divergence is None:
            parts.append(
                f"<p><b>{escape(row.name)}</b>: the same tokens as {escape(comparison.baseline)}.</p>"
            )
            continue
        start, own, other = row.texts
        found = row.divergence
        parts.append(
            f"<h3>{escape(row.name)}</h3><p>Token {found.index + 1} behind “{escape(start)}”: it prefers "
            f"its own by {found.gap:.3g}, {escape(comparison.baseline)} its own by "
            f"{found.baseline_gap:.3g} (logits).</p>"
            f"<blockquote><b>{escape(row.name)}</b> …{escape(own)}</blockquote>"
            f"<blockquote><b>{escape(comparison.baseline)}</b> …{escape(other)}</blockquote>"
        )
    return "".join(parts)
