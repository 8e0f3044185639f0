"""Plots as inline SVG, coloured by the page's own variables. Knows points and labels; no meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[str, float, float, bool]
# Narrow, so that on a phone, which shows all of it, words are as large as in a text.
_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 24, 46
_LABEL = 116  # what the names of rows take
_NUM_COLOURS = 6  # of curves, in the page's style


def scatter(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Points (label, x, y, on the front); those of the front are joined. Both axes begin at 0."""
    known = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if not known:
        return "<p>Nothing to plot.</p>"
    x_most = 1.15 * max(x for _, x, _, _ in known) or 1.0
    y_most = 1.15 * max(y for _, _, y, _ in known) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        inner_x, inner_y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + inner_x * x / x_most, _HEIGHT - _BOTTOM - inner_y * y / y_most

    parts = [_axes(x_most, y_most, x_title, y_title)]
    front = sorted((x, y) for _, x, y, is_best in known if is_best)
    if len(front) > 1:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in front))
        parts.append(f"<polyline class='front' points='{path}'/>")
    for label, x, y, is_best in known:
        px, py = place(x, y)
        anchor, shift = ("end", -9) if px > _WIDTH * 0.7 else ("start", 9)
        parts.append(f"<circle class='{'a' if is_best else 'b'}' cx='{px:.1f}' cy='{py:.1f}' r='5'/>")
        parts.append(
            f"<text x='{px + shift:.1f}' y='{py - 8:.1f}' text-anchor='{anchor}'>{escape(label)}</text>"
        )
    return _svg(_WIDTH, _HEIGHT, parts, f"{y_title} against {x_title}")


def curve_plot(curves: Sequence[tuple[str, Sequence[float]]], x_title: str) -> str:
    """For each label the share of its values, sorted, that lie at or below x. Values beyond nine tenths of
    all by more than half are cut off, so that one slow request does not squeeze the rest."""
    every = sorted(value for _, values in curves for value in values if math.isfinite(value))
    if not every:
        return "<p>Nothing to plot.</p>"
    x_most = min(every[-1], 1.5 * every[int(0.9 * (len(every) - 1))]) * 1.05 or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = [_axes(x_most, 1.0, x_title, "share of requests")]
    for index, (label, values) in enumerate(curves):
        points = [(float(_LEFT), 0.0)]
        for rank, value in enumerate(sorted(values), 1):
            x = _LEFT + width * min(value, x_most) / x_most
            points += [(x, points[-1][1]), (x, rank / len(values))]
        path = " ".join(f"{x:.1f},{_TOP + height * (1 - share):.1f}" for x, share in points)
        kind = f"c{index % _NUM_COLOURS}"
        dash = "" if index < _NUM_COLOURS else " stroke-dasharray='6 4'"
        parts.append(f"<polyline class='curve {kind}' points='{path}'{dash}/>")
        y = _HEIGHT + 18 * index + 10
        parts.append(
            f"<line class='curve {kind}' x1='{_LEFT}' y1='{y - 4}' x2='{_LEFT + 26}' y2='{y - 4}'{dash}/>"
        )
        parts.append(f"<text x='{_LEFT + 34}' y='{y}'>{escape(_short(label, 44))}</text>")
    return _svg(_WIDTH, _HEIGHT + 18 * len(curves) + 4, parts, f"share of requests against {x_title}")


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars from 0 with their numbers."""
    most = max((value for _, value in values if math.isfinite(value)), default=0.0) or 1.0
    row, top = 30, 26
    parts = [f"<text class='soft' x='0' y='14'>{escape(title)}</text>"]
    for index, (label, value) in enumerate(values):
        y = top + index * row
        width = (_WIDTH - _LABEL - 56) * value / most if math.isfinite(value) else 0.0
        parts.append(f"<text x='0' y='{y + 15}'>{escape(_short(label, 17))}</text>")
        parts.append(f"<rect class='a' x='{_LABEL}' y='{y + 2}' width='{width:.1f}' height='18' rx='3'/>")
        parts.append(f"<text x='{_LABEL + 8 + width:.1f}' y='{y + 15}'>{value:.3g}</text>")
    return _svg(_WIDTH, top + row * len(values) + 8, parts, title)


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], *, unit: str) -> str:
    """A cell for each row and label, darker the larger its value, on a logarithmic scale."""
    values = [value for _, cells in rows for value in cells if math.isfinite(value) and value > 0]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)
    span = max(high - low, 1e-9)
    cell = min(40.0, (_WIDTH - _LABEL) / max(1, len(labels)))
    parts: list[str] = []
    for index, (name, cells) in enumerate(rows):
        y = 8 + 30 * index
        parts.append(f"<text x='0' y='{y + 18}'>{escape(_short(name, 17))}</text>")
        for column, value in enumerate(cells):
            known = math.isfinite(value) and value > 0
            strength = 0.08 + 0.92 * (math.log10(value) - low) / span if known else 0.03
            x = _LABEL + column * cell
            parts.append(
                f"<rect class='b' x='{x:.1f}' y='{y}' width='{0.92 * cell:.2f}' height='26' "
                f"opacity='{strength:.2f}'><title>{escape(name)}, {escape(labels[column])}: "
                f"{value:.3g}</title></rect>"
            )
    bottom = 8 + 30 * len(rows)
    last = _LABEL + cell * len(labels)
    parts.append(f"<text class='soft' x='{_LABEL}' y='{bottom + 16}'>{escape(labels[0])}</text>")
    parts.append(
        f"<text class='soft' x='{last:.1f}' y='{bottom + 16}' text-anchor='end'>{escape(labels[-1])}</text>"
    )
    if values:
        told = f"{unit}: {10**low:.2g} (pale) to {10**high:.2g} (full)"
        parts.append(f"<text class='soft' x='0' y='{bottom + 38}'>{escape(told)}</text>")
    return _svg(_WIDTH, bottom + 48, parts, unit)


def _axes(x_most: float, y_most: float, x_title: str, y_title: str) -> str:
    parts: list[str] = []
    for step in range(5):
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / 4
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * step / 4
        parts.append(
            f"<line class='axis' x1='{_LEFT}' y1='{y:.1f}' x2='{_WIDTH - _RIGHT}' y2='{y:.1f}'/>"
            f"<text class='soft' x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>"
            f"{_tick(y_most * step / 4)}</text>"
            f"<text class='soft' x='{x:.1f}' y='{_HEIGHT - _BOTTOM + 18}' text-anchor='middle'>"
            f"{_tick(x_most * step / 4)}</text>"
        )
    parts.append(
        f"<text class='soft' x='{_WIDTH - _RIGHT}' y='{_HEIGHT - 8}' text-anchor='end'>"
        f"{escape(x_title)}</text>"
        f"<text class='soft' x='0' y='12'>{escape(y_title)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f"<svg viewBox='0 0 {width:.0f} {height:.0f}' role='img' aria-label='{escape(title, quote=True)}'>"
        f"{''.join(parts)}</svg>"
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
