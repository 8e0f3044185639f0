"""Artifacts that a comparison makes for itself: compiled once for one recipe and code, then kept."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...artifact.reader import Artifact, open_unchecked
from ...codegen.base import default_target
from ...passes.recipes import Recipe, override, preset_recipe, read_recipe, to_yaml
from ..cache.session import CompileCache
from ..cache.sources import ROOT, environment
from ..driver import compile_model
from ..ledger import Progress
from ..source import find_model

_KIND = "artifact"
_NAME = "model.llmc"
ORIGINAL = "original"
_FILES = (".yaml", ".yml")
WRITING_ROOMS = ("artifact", "codegen", "compiler", "ir", "kernels", "passes", "spec")


class HowToMake(Protocol):
    """What of a request decides how sides are compiled."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Texts `pass.option=value`."""
        ...

    @property
    def target(self) -> str | None:
        """Target of every side; None is the machine's default."""
        ...

    @property
    def dtype(self) -> str | None:
        """Compute dtype of every side; None keeps the checkpoint's."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One compile: `quant` or `recipe`, and the text that tells it from others."""

    quant: str | None
    recipe: Path | None
    overrides: tuple[str, ...]
    dtype: str | None
    text: str


def compile_side(
    model: str, recipe: str, how: HowToMake, cache: CompileCache, progress: Progress
) -> Artifact:
    """The artifact of `model` under `recipe` (a preset, a YAML file, or `original`), from the cache where the
    same code made it before. Raises what `compile_model` raises."""
    plan = _plan(recipe, how)
    target = how.target or default_target()
    folder = find_model(model)
    if not cache.is_on:
        made = Path(tempfile.mkdtemp(prefix="llmc-compare-")) / _NAME
        return open_unchecked(_compile(model, plan, target, made, progress))
    inputs = sorted(path for path in folder.iterdir() if path.is_file())
    digests = tuple((path.name, cache.file_digest(path)) for path in inputs)
    key = hashlib.sha256(
        repr((digests, plan.text, plan.dtype, target, code_digest(), environment())).encode()
    )
    found = cache.store.find(_KIND, key.hexdigest())
    if found is None:
        with tempfile.TemporaryDirectory(prefix="llmc-compare-") as folder_name:
            started = time.perf_counter()
            made = _compile(model, plan, target, Path(folder_name) / _NAME, progress)
            label = f"{folder.name}, {recipe}, {target}"
            found = cache.store.keep(
                _KIND,
                key.hexdigest(),
                label,
                lambda place: _copy(made, place),
                seconds=time.perf_counter() - started,
            )
            if found is None:  # the disk is full: a copy that lives as long as the machine's temporary files
                kept = Path(tempfile.mkdtemp(prefix="llmc-compare-"))
                _copy(made, kept)
                found = kept
    return open_unchecked(found / _NAME)


def recipe_named(recipe: str) -> Recipe:
    """The preset or YAML file of that name. Raises RecipeError naming the closest presets, or what is wrong
    in the file."""
    return read_recipe(Path(recipe)) if recipe.endswith(_FILES) else preset_recipe(recipe)


def _plan(recipe: str, how: HowToMake) -> _Plan:
    if recipe == ORIGINAL:
        return _Plan(quant=None, recipe=None, overrides=(), dtype="float32", text=ORIGINAL)
    is_file = recipe.endswith(_FILES)
    read = recipe_named(recipe)
    own = {pass_.name for pass_ in read.passes}
    overrides = tuple(text for text in how.overrides if text.partition(".")[0] in own)
    return _Plan(
        quant=None if is_file else recipe,
        recipe=Path(recipe) if is_file else None,
        overrides=overrides,
        dtype=how.dtype,
        text=to_yaml(override(read, overrides)),
    )


def _compile(model: str, plan: _Plan, target: str, output: Path, progress: Progress) -> Path:
    result = compile_model(
        model,
        output=output,
        quant=plan.quant,
        recipe=plan.recipe,
        overrides=plan.overrides,
        dtype=plan.dtype,
        target=target,
        progress=progress,
    )
    return result.path


def _copy(made: Path, place: Path) -> None:
    shutil.copytree(made, place / _NAME)


def code_digest(rooms: Sequence[str] = WRITING_ROOMS) -> str:
    """The digest of the code in `rooms`, by default of all that writes artifacts; comparing writes none."""
    digest = hashlib.sha256()
    skipped = {ROOT / "compiler" / room for room in ("compare", "search")}
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".hpp") and skipped.isdisjoint(path.parents):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
