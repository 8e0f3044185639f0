"""Stop strings in a stream of text. Knows characters only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    """Text that is safe to show, and the stop string that was found behind it."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the first stop string to be completed, and holds back text that may still become one.

    Of strings completed by the same character the longest wins. How the text is cut into pieces makes
    no difference. Text from a match on is never shown.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Takes more text."""
        if not self._stops:
            return StopResult(text)
        buffer = self._held + text
        found = self._first_match(buffer, len(self._held))
        if found is not None:
            start, stop = found
            self._held = ""
            return StopResult(buffer[:start], stop)
        keep = self._possible_start(buffer)
        self._held = buffer[keep:]
        return StopResult(buffer[:keep])

    def finish(self) -> str:
        """What is held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, num_old: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first; it ends in the new text."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None or candidate < best else best
        return None if best is None else (best[1], best[2])

    def _possible_start(self, buffer: str) -> int:
        """The first place from which the rest of `buffer` is the beginning of a stop string."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            rest = buffer[start:]
            if any(stop.startswith(rest) for stop in self._stops):
                return start
        return len(buffer)
