"""Offsets of intermediate buffers in one arena: buffers that live at the same time never overlap."""

from __future__ import annotations

from collections.abc import Mapping

ALIGN = 64


def plan_arena(
    sizes: Mapping[str, int], lifetimes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, int], int]:
    """Offsets in bytes by buffer, and the bytes of the arena.

    Greedy by size, largest first, each at the lowest offset free over its life (Pisarchyk & Lee 2020).
    """
    placed: list[tuple[int, int, int, int]] = []
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        first, last = lifetimes[name]
        size = -(-sizes[name] // ALIGN) * ALIGN
        busy = sorted((o, o + s) for o, s, f, e in placed if f <= last and first <= e)
        offset = 0
        for start, stop in busy:
            if start - offset >= size:
                break
            offset = max(offset, stop)
        offsets[name] = offset
        placed.append((offset, size, first, last))
    return offsets, max((offset + size for offset, size, _, _ in placed), default=0)
