"""Why an artifact is as it is, from its manifest alone: what was fused and what not, which decisions were
taken, and which input differs from another artifact's."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from .schema import Manifest

_FUSING = ("fuse_", "gated_activation", "name_", "rope", "normalize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What one rewriting pass found, and its reasons for what it left alone."""

    name: str
    matches: int
    misses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How often one pass chose what, with an example of the reason."""

    name: str
    counts: dict[str, int]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One input in which two artifacts differ."""

    what: str
    here: str
    there: str


def fusions(manifest: Manifest) -> tuple[Fusion, ...]:
    """The passes that rewrite operators into larger ones, in order."""
    return tuple(
        Fusion(name=record.name, matches=record.matches, misses=record.misses)
        for record in manifest.history
        if record.name.startswith(_FUSING)
    )


def choices(manifest: Manifest) -> tuple[Choices, ...]:
    """The decisions of every pass that took some, counted by what was chosen."""
    found: list[Choices] = []
    for record in manifest.history:
        if record.decisions:
            counts = Counter(decision.choice for decision in record.decisions)
            reason = record.decisions[0].reason
            found.append(Choices(name=record.name, counts=dict(counts.most_common()), reason=reason))
    return tuple(found)


def changes(manifest: Manifest, other: Manifest) -> tuple[Change, ...]:
    """Every input in which two artifacts differ: source files, tools, target, precision, passes, options."""
    pairs = _inputs(manifest), _inputs(other)
    names = list(dict.fromkeys((*pairs[0], *pairs[1])))
    return tuple(
        Change(what=name, here=pairs[0].get(name, "absent"), there=pairs[1].get(name, "absent"))
        for name in names
        if pairs[0].get(name) != pairs[1].get(name)
    )


def inputs_key(manifest: Manifest) -> str:
    """One digest of every input that `changes` compares: equal for artifacts made of the same things."""
    text = "\n".join(f"{name}={value}" for name, value in sorted(_inputs(manifest).items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _inputs(manifest: Manifest) -> dict[str, str]:
    """What an artifact was made of, by name."""
    found = {f"source {file.name}": file.sha256[:12] for file in manifest.provenance.files}
    found |= {f"tool {name}": version for name, version in manifest.provenance.tools.items()}
    found["llmc"] = manifest.provenance.llmc_version
    found["target"] = manifest.target.name
    found["compute dtype"] = manifest.spec.compute_dtype
    found["context"] = str(manifest.spec.max_context)
    seen: Counter[str] = Counter()
    for step in manifest.recipe.steps:
        seen[step.name] += 1
        name = step.name if seen[step.name] == 1 else f"{step.name} ({seen[step.name]})"
        found[f"pass {name}"] = "runs"
        found |= {f"{name}.{option}": str(value) for option, value in step.options.items()}
    return found
