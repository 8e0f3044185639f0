"""Presets: recipes by name, each an ordered tuple of pass instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..spec.errors import RecipeError
from .base import Pass
from .options import closest
from .pipeline import canonicalise, fuse, layout, plan, quantise


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A recipe that llmc brings: its name, what it is good for, and its passes."""

    name: str
    summary: str
    build: Callable[[], tuple[Pass, ...]]


def none() -> tuple[Pass, ...]:
    """The checkpoint's own precision."""
    return (*canonicalise(), *fuse(), *layout(), *plan())


def int8() -> tuple[Pass, ...]:
    """8-bit weights in groups of 32."""
    return (*canonicalise(), *fuse(), *quantise(8, 32), *layout(), *plan())


def int4() -> tuple[Pass, ...]:
    """4-bit weights in groups of 32, head and embedding at 8 bits."""
    return (*canonicalise(), *fuse(), *quantise(4, 32), *layout(), *plan())


PRESETS: tuple[Preset, ...] = (
    Preset(name="none", summary="the checkpoint's own precision", build=none),
    Preset(name="int8", summary="8-bit weights in groups of 32, rounded to nearest", build=int8),
    Preset(
        name="int4",
        summary="4-bit weights in groups of 32, head and embedding at 8 bits, rounded to nearest",
        build=int4,
    ),
)


def preset_named(name: str) -> Preset:
    """The preset called `name`. Raises RecipeError naming the closest ones."""
    known = {preset.name: preset for preset in PRESETS}
    if name not in known:
        raise RecipeError(
            "recipe.unknown_preset",
            f"There is no preset {name!r}.",
            f"The presets are: {', '.join(known)}.",
            closest(name, known),
        )
    return known[name]
