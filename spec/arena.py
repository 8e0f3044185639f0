"""Place buffers of known size and life in one arena, so that no two that live at once overlap.

Pure arithmetic over integers; knows no graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .plans import BufferSlot

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A value of `size_bytes` that must be kept from step `first` to step `last`, both included."""

    value: str
    size_bytes: int
    first: int
    last: int


def place(buffers: Sequence[Buffer]) -> tuple[BufferSlot, ...]:
    """Offsets for `buffers`, in order of first use.

    Greedy by size (Pisarchyk & Lee 2020): the largest buffer first, each into the smallest gap that
    holds it between buffers already placed that live at the same time. Offsets are multiples of
    `ALIGNMENT_BYTES`.
    """
    placed: list[BufferSlot] = []
    for buffer in sorted(buffers, key=lambda buffer: (-buffer.size_bytes, buffer.first, buffer.value)):
        alive = [slot for slot in placed if slot.first <= buffer.last and buffer.first <= slot.last]
        placed.append(
            BufferSlot(
                value=buffer.value,
                offset_bytes=_best_gap(alive, buffer.size_bytes),
                size_bytes=buffer.size_bytes,
                first=buffer.first,
                last=buffer.last,
            )
        )
    return tuple(sorted(placed, key=lambda slot: (slot.first, slot.offset_bytes, slot.value)))


def _best_gap(alive: Sequence[BufferSlot], size: int) -> int:
    """The offset of the smallest gap of at least `size` bytes between `alive`, or above all of them."""
    best: tuple[int, int] | None = None
    end = 0
    for slot in sorted(alive, key=lambda slot: slot.offset_bytes):
        gap = slot.offset_bytes - end
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, end)
        end = max(end, _aligned(slot.offset_bytes + slot.size_bytes))
    return end if best is None else best[1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def arena_bytes(slots: Iterable[BufferSlot]) -> int:
    """Bytes of the arena that holds `slots`."""
    return max((slot.offset_bytes + slot.size_bytes for slot in slots), default=0)


def live_bytes(buffers: Sequence[Buffer]) -> int:
    """The most bytes that live at one step: no placement can do with less."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.first] = changes.get(buffer.first, 0) + buffer.size_bytes
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - buffer.size_bytes
    most = now = 0
    for step in sorted(changes):
        now += changes[step]
        most = max(most, now)
    return most
