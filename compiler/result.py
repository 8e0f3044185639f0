"""What a compile hands back: where the artifact is, how big, how good, and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.fit import Fit
from .ledger import StageTime
from .quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSummary:
    """One pass of the pipeline as it ran."""

    name: str
    seconds: float
    matches: int
    cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What a compile had of the cache: entries found and not, by kind; seconds that those found took when
    they were made; and why something was not kept."""

    hits: dict[str, int]
    misses: dict[str, int]
    saved_s: float
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The same in words."""
        found = [
            f"{count} of {count + self.misses.get(kind, 0)} {_PLURALS[kind]}"
            for kind, count in self.hits.items()
            if count and kind in _PLURALS
        ]
        reused = f"reused {', '.join(found)}: saved {self.saved_s:.1f} s" if found else "nothing to reuse"
        return "; ".join([reused, *self.notes])


# Kinds of entries that a user has heard of.
_PLURALS = {
    "trace": "traces",
    "pass": "passes",
    "check": "checks",
    "weights": "weights",
    "result": "libraries",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """One finished compile, or dry run (then nothing was written and `quality` is None).

    `size_bytes` is of all files of the artifact (of a dry run: an upper bound), `bits_per_weight` of its
    weights over the model's parameters. `reuse` is None where the compile cache was off. `ways` are what a
    dry run found to make it fit here, where it does not.
    """

    path: Path
    target: str
    recipe: str
    dry_run: bool
    seconds: float
    size_bytes: int
    bits_per_weight: float
    fit: Fit
    quality: Quality | None
    passes: tuple[PassSummary, ...]
    ledger: tuple[StageTime, ...]
    reuse: Reuse | None = None
    ways: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc compile --json` prints. Times in seconds, sizes in bytes."""
        return {
            "artifact": str(self.path),
            "target": self.target,
            "recipe": self.recipe,
            "dry_run": self.dry_run,
            "seconds": self.seconds,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "memory": asdict(self.fit),
            "quality": self.quality.as_dict() if self.quality is not None else None,
            "passes": [asdict(entry) for entry in self.passes],
            "ledger": [asdict(entry) for entry in self.ledger],
            "ways": list(self.ways),
            "cache": asdict(self.reuse) if self.reuse is not None else None,
        }
