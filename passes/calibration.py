"""What passes may know of the data that a model will see: token sequences, and a place to keep results.

Knows neither files of text nor tokenizers; those who make a Calibration do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# Of a stream's activations; what goes beyond is spilled.
MEMORY_BYTES = 512 << 20


def _unwatched(done: int, total: int, what: str) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Token sequences for passes that look at activations.

    `source` says in words where they come from. Passes keep results under `folder`, named by what they
    were computed from, and take them up again when they find them there; activations beyond `memory_bytes` a
    stream are spilled there too. `watch(done, total, what)` hears of progress.
    """

    sequences: tuple[tuple[int, ...], ...]
    source: str
    folder: Path
    memory_bytes: int = MEMORY_BYTES
    watch: Callable[[int, int, str], None] = _unwatched

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    def cache_key(self) -> str:
        """What results depend on: the tokens, not where they came from or where results are kept."""
        return hashlib.sha256(repr(self.sequences).encode()).hexdigest()


def first_tokens(calibration: Calibration, num_tokens: int) -> Calibration:
    """`calibration` with as many whole sequences from the start as it takes to have `num_tokens`, or all."""
    found: list[tuple[int, ...]] = []
    for sequence in calibration.sequences:
        if found and sum(map(len, found)) >= num_tokens:
            break
        found.append(sequence)
    return replace(calibration, sequences=tuple(found))
