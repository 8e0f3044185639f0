"""The sides of a comparison: artifacts as they are, recipes compiled on the way, a model folder as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...artifact.checksums import sha256_of
from ...artifact.reader import Artifact, is_artifact, open_unchecked
from ...spec.errors import UsageError
from ...spec.model import ModelSpec
from ..cache.config import CacheConfig
from ..cache.session import CompileCache
from ..ledger import Progress
from ..source import find_model
from .made import ORIGINAL, compile_side, recipe_named

_TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One artifact in a comparison, under a name of its own."""

    name: str
    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class SideRequest:
    """What is to be compared: `paths` are artifacts or one model folder, `recipes` presets or YAML files for
    the model, `overrides` apply to each."""

    paths: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    target: str | None = None
    dtype: str | None = None


def open_sides(request: SideRequest, cache: CompileCache, progress: Progress) -> tuple[Side, ...]:
    """Every side, compiled where it must be. A model folder without recipes is the original: unquantised, in
    float32, for the target of the first artifact where `request` names none.

    Raises UsageError for fewer than two sides, recipes without a model, and artifacts that do not belong
    to one model and tokenizer, naming what differs.
    """
    models = [path for path in request.paths if not is_artifact(Path(path))]
    if request.recipes and len(models) != 1:
        raise _usage(
            "compare.recipes",
            f"{len(request.recipes)} recipes were given for {len(models)} models.",
            "Recipes are compared on one model; artifacts are compiled already.",
            "Name one model folder, and recipes with --recipe.",
        )
    _check_overrides(request)
    made = {path: open_unchecked(path) for path in request.paths if path not in models}
    if request.target is None and made:
        request = replace(request, target=next(iter(made.values())).manifest.target.name)
    sides: list[Side] = []
    for path in request.paths:
        if path in made:
            sides.append(Side(name=Path(path).name.removesuffix(".llmc"), artifact=made[path]))
            continue
        find_model(path)
        for recipe in request.recipes or (ORIGINAL,):
            sides.append(
                Side(name=_name(recipe), artifact=compile_side(path, recipe, request, cache, progress))
            )
    if len(sides) < 2:
        raise _usage(
            "compare.sides",
            f"There is {len(sides)} side to compare.",
            "A comparison needs at least two.",
            "Name two artifacts, or a model and two recipes (--recipe int4 --recipe int8).",
        )
    named = _distinct(sides)
    check_alike(named)
    return named


def _check_overrides(request: SideRequest) -> None:
    """Each override must be of a pass that some recipe has; recipes without the pass stay as they are."""
    passes = {pass_.name for recipe in request.recipes for pass_ in recipe_named(recipe).passes}
    for text in request.overrides:
        if text.partition(".")[0] not in passes:
            known = f"The recipes have the passes {', '.join(sorted(passes))}."
            raise _usage(
                "compare.override",
                f"The override {text!r} changes nothing here.",
                known if passes else "Overrides change recipes, and none was given.",
                "Write pass.option=value for a pass of a recipe that is compared.",
            )


def check_alike(sides: Sequence[Side]) -> None:
    """Raises UsageError naming what differs where sides are not of one model and tokenizer."""
    first = sides[0]
    for other in sides[1:]:
        for what, one, two in _facts(first, other):
            if one != two:
                raise _usage(
                    "compare.models",
                    f"{first.name!r} and {other.name!r} are not of one model.",
                    f"They differ in {what}: {one} and {two}.",
                    "Compare artifacts of the same model and tokenizer.",
                )


def _facts(one: Side, two: Side) -> list[tuple[str, object, object]]:
    a, b = one.artifact.manifest, two.artifact.manifest
    facts = model_facts(a.spec, b.spec)
    weights = [
        {file.sha256 for file in manifest.provenance.files if file.name.endswith(".safetensors")}
        for manifest in (a, b)
    ]
    if all(weights):
        facts.append(("the source's weights", sorted(weights[0])[0][:12], sorted(weights[1])[0][:12]))
    paths = [side.artifact.path / _TOKENIZER for side in (one, two)]
    digests = [sha256_of(path)[:12] if path.is_file() else "none" for path in paths]
    facts.append(("the tokenizer", digests[0], digests[1]))
    return facts


def model_facts(one: ModelSpec, two: ModelSpec) -> list[tuple[str, object, object]]:
    """What two specs of one model agree in: name, value of the one, value of the other."""
    names = ("architecture", "num_layers", "hidden_size", "vocab_size", "num_parameters")
    return [(name.replace("_", " "), getattr(one, name), getattr(two, name)) for name in names]


def _distinct(sides: Sequence[Side]) -> tuple[Side, ...]:
    """Sides of one name get numbers."""
    seen: dict[str, int] = {}
    named: list[Side] = []
    for side in sides:
        seen[side.name] = seen.get(side.name, 0) + 1
        name = side.name if seen[side.name] == 1 else f"{side.name} ({seen[side.name]})"
        named.append(Side(name=name, artifact=side.artifact))
    return tuple(named)


def _name(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def open_cache() -> CompileCache:
    """The user's compile cache."""
    return CompileCache(CacheConfig.from_environment())


def _usage(code: str, what: str, why: str, fix: str) -> UsageError:
    return UsageError(code, what, why, fix)
