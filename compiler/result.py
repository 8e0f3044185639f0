"""What a compile hands back: where the artifact is, how big, how good, and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .ledger import StageTime
from .preflight import Fit
from .quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSummary:
    """One pass of the pipeline as it ran."""

    name: str
    seconds: float
    matches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """One finished compile, or dry run (then nothing was written and `quality` is None).

    `size_bytes` is of all files of the artifact (of a dry run: an upper bound), `bits_per_weight` of its
    weights over the model's parameters.
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
        }
