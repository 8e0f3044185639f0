"""Presets: recipes by name, each an ordered tuple of pass instances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..spec.errors import RecipeError
from .base import Pass
from .options import closest
from .pipeline import (
    canonicalise,
    fuse,
    keep,
    layout,
    plan,
    round_both_to_int8,
    round_calibrated,
    round_searched,
    round_sensitive,
    round_to_fp8,
    round_within,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A recipe that llmc brings: its name, what it is good for, and its passes.

    A compile is refused when the mean KL divergence of its logits from the unquantised model's is above
    `max_kl`, in nats; None lets everything through.
    """

    name: str
    summary: str
    build: Callable[[], tuple[Pass, ...]]
    max_kl: float | None = None


def none() -> tuple[Pass, ...]:
    """The checkpoint's own precision."""
    return _with(())


def int8() -> tuple[Pass, ...]:
    """8-bit weights in groups of 32 on searched scales."""
    return _with(round_searched(8, 32))


def int4() -> tuple[Pass, ...]:
    """4-bit weights in groups of 32 by GPTQ on searched scales, head and embedding at 8 bits; of small models
    also the linears that change the output most, for at most 3 % more bytes."""
    return _with(round_calibrated(4, 32, growth=0.03))


def int4_fast() -> tuple[Pass, ...]:
    """4-bit weights in groups of 32 on scales searched by the weights alone."""
    return _with(round_searched(4, 32))


def int4_small() -> tuple[Pass, ...]:
    """4-bit weights in groups of 128 by GPTQ on searched scales."""
    return _with(round_calibrated(4, 128))


def int4_max() -> tuple[Pass, ...]:
    """4-bit weights with zero points in groups of 32, the most sensitive ones at 8 bits, by more descent and
    more learning from the logits."""
    return _with(round_sensitive(0.004))


def mixed() -> tuple[Pass, ...]:
    """4 and 8 bits as each weight's influence on the output deserves, 4.5 bits a weight altogether."""
    return _with(round_within(4.5))


def int3() -> tuple[Pass, ...]:
    """3-bit weights in groups of 128 by GPTQ on searched scales."""
    return _with(round_calibrated(3, 128, rounds=6))


def fp8() -> tuple[Pass, ...]:
    """8-bit floats: weights by row, inputs by token."""
    return _with(round_to_fp8())


def w8a8() -> tuple[Pass, ...]:
    """8-bit integers: weights by row, inputs by token, balanced against each other."""
    return _with(round_both_to_int8())


def _with(quantisers: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return (*canonicalise(), *fuse(), *keep(), *quantisers, *layout(), *plan())


PRESETS: tuple[Preset, ...] = (
    Preset(name="none", summary="the checkpoint's own precision", build=none),
    Preset(
        name="int8",
        summary="hardly told from the original: 8-bit weights, no calibration",
        build=int8,
        max_kl=0.05,
    ),
    Preset(
        name="int4",
        summary="the one to start with: 4-bit weights in groups of 32, calibrated",
        build=int4,
        max_kl=0.3,
    ),
    Preset(
        name="int4-fast",
        summary="when it must not take long: 4-bit weights in groups of 32, no calibration",
        build=int4_fast,
        max_kl=0.4,
    ),
    Preset(
        name="int4-small",
        summary="the fewest bytes that still read well: 4-bit weights in groups of 128, calibrated",
        build=int4_small,
        max_kl=0.4,
    ),
    Preset(
        name="int4-max",
        summary="quality first: 4-bit weights where that changes little, else 8 bits, calibrated longest",
        build=int4_max,
        max_kl=0.2,
    ),
    Preset(
        name="mixed",
        summary="a size to keep to (--set mixed_precision.budget=4.25): bits where they matter, calibrated",
        build=mixed,
        max_kl=0.4,
    ),
    Preset(
        name="int3",
        summary="when 4 bits do not fit: 3-bit weights in groups of 128, stored in 4 bits, calibrated",
        build=int3,
        max_kl=1.0,
    ),
    Preset(
        name="fp8",
        summary="for hardware that multiplies 8-bit floats: weights and inputs, no calibration",
        build=fp8,
        max_kl=0.1,
    ),
    Preset(
        name="w8a8",
        summary="for hardware that multiplies 8-bit integers: weights and inputs, calibrated",
        build=w8a8,
        max_kl=0.1,
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
