"""A comparison in words: one ratio, one table for a terminal, one sentence of advice."""

from __future__ import annotations

from .compare import Comparison, Row, columns_of
from .statistics import Ratio


def ratio_text(ratio: Ratio) -> str:
    """`×1.21 (1.18–1.24)`, or `no difference` where the interval holds 1."""
    if not ratio.is_different:
        return "no difference"
    return f"×{ratio.ratio:.3g} ({ratio.low:.3g}–{ratio.high:.3g})"


def terminal_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with a configuration a column: names are few, numbers many."""
    header = ["", *(_starred(comparison, row) for row in comparison.rows)]
    lines: list[list[str]] = []
    for column in columns_of(comparison):
        cells: list[str] = []
        for row in comparison.rows:
            value = row.values.get(column.key)
            ratio = row.ratios.get(column.key)
            told = "" if ratio is None or row.name == comparison.baseline else f"  {ratio_text(ratio)}"
            cells.append("–" if value is None else column.write(value) + told)
        lines.append([column.title, *cells])
    lines.append(["first difference", *(_parting(comparison, row) for row in comparison.rows)])
    return header, lines


def divergence_lines(comparison: Comparison) -> list[str]:
    """Both continuations where a side's text leaves the baseline's."""
    lines: list[str] = []
    for row in comparison.rows:
        found = row.divergence
        if found is None or row.name == comparison.baseline:
            continue
        _, own, other = row.texts
        where = f"token {found.index + 1} of prompt {found.prompt + 1}"
        gaps = f"logit gaps {found.gap:.3g} and {found.baseline_gap:.3g}"
        lines.append(
            f"{row.name} leaves {comparison.baseline} at {where} ({gaps}):\n"
            f"  {row.name}: …{own!r}\n  {comparison.baseline}: …{other!r}"
        )
    return lines


def advice(comparison: Comparison) -> str:
    """Which configuration to take, and what that costs, in plain words."""
    front = [row for row in comparison.rows if row.name in comparison.pareto]
    if not front:
        return "No configuration gave numbers that could be compared."
    faithful = min(front, key=lambda row: row.values["kl_mean"])
    small = min(front, key=lambda row: row.values["size_bytes"])
    if faithful is small:
        return f"Take {small.name}: nothing here is smaller, nearer to the original or faster."
    share = small.values["size_bytes"] / faithful.values["size_bytes"]
    ratio = small.ratios.get("tpot_s")
    base = faithful.ratios.get("tpot_s")
    speed = "about as fast"
    if ratio is not None and base is not None and (ratio.is_different or base.is_different):
        times = base.ratio / ratio.ratio
        speed = f"{times:.2f} times as fast" if times >= 1 else f"{1 / times:.2f} times slower"
    agrees = f"{100 * small.values['same_top']:.0f} % of its likeliest tokens are the same"
    return (
        f"{small.name} takes {100 * share:.0f} % of the bytes of {faithful.name} and is {speed}; {agrees}. "
        f"Take {faithful.name} where every token counts."
    )


def _starred(comparison: Comparison, row: Row) -> str:
    star = " *" if row.name in comparison.pareto else ""
    return row.name + star


def _parting(comparison: Comparison, row: Row) -> str:
    if row.name == comparison.baseline:
        return "(baseline)"
    return "none" if row.divergence is None else f"token {row.divergence.index + 1}"
