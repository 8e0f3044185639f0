"""What a search over recipes may try: presets, and the values that stand beside the options of their passes.

Knows recipes; nothing of how they are judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...passes.base import OptionInfo, OptionValue, Pass, option_values, options_of
from ...passes.options import build_pass
from ...passes.presets import PRESETS
from ...passes.recipes import Recipe, preset_recipe

METHOD = "method"
Params = Mapping[str, OptionValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One option of one pass, and every value that is tried for it: those beside the option and those of
    presets. Methods with the same pass share the axis, and so what is learnt on it."""

    pass_name: str
    option: str
    values: tuple[OptionValue, ...]

    @property
    def name(self) -> str:
        """What a study and a command line call it."""
        return f"{self.pass_name}.{self.option}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Methods (presets that differ in more than axes) with their axes, and what to try first."""

    methods: Mapping[str, tuple[Axis, ...]]
    first: tuple[Params, ...]

    def all_params(self) -> Iterator[Params]:
        """Everything that can be tried."""
        for method, axes in self.methods.items():
            for values in itertools.product(*(axis.values for axis in axes)):
                yield {METHOD: method} | dict(zip([axis.name for axis in axes], values, strict=True))


def search_space(kind: str) -> Space:
    """The space for targets of `kind`. Presets that differ in searched options alone are one method, called
    after the first; every preset is a point of the space, and all of them come first."""
    values = _searched_values(kind)
    methods: dict[str, tuple[Axis, ...]] = {}
    shapes: dict[tuple[object, ...], str] = {}
    first: list[Params] = []
    for preset in PRESETS:
        passes = preset.build()
        axes = tuple(
            Axis(pass_name=pass_.name, option=info.name, values=values[pass_.name, info.name])
            for pass_ in passes
            for info in options_of(type(pass_))
            if (pass_.name, info.name) in values
        )
        method = shapes.setdefault(_shape(passes, axes), preset.name)
        methods.setdefault(method, axes)
        own = {(pass_.name, name): value for pass_ in passes for name, value in option_values(pass_).items()}
        first.append({METHOD: method} | {axis.name: own[axis.pass_name, axis.option] for axis in axes})
    return Space(methods=methods, first=tuple(first))


def recipe_of(space: Space, params: Params) -> Recipe:
    """The recipe that parameters mean: the preset it is equal to, or named after what it changes of its
    method's."""
    method = str(params[METHOD])
    base = preset_recipe(method)
    axes = space.methods[method]
    passes = tuple(
        build_pass(
            type(pass_),
            option_values(pass_)
            | {axis.option: params[axis.name] for axis in axes if axis.pass_name == pass_.name},
        )
        for pass_ in base.passes
    )
    for preset in PRESETS:
        if preset.build() == passes:
            return Recipe(name=preset.name, passes=passes)
    old = {(pass_.name, name): value for pass_ in base.passes for name, value in option_values(pass_).items()}
    changed = [
        f"{axis.pass_name}-{axis.option}-{params[axis.name]}"
        for axis in axes
        if params[axis.name] != old[axis.pass_name, axis.option]
    ]
    return Recipe(name="_".join([method, *changed]), passes=passes)


def _searched_values(kind: str) -> dict[tuple[str, str], tuple[OptionValue, ...]]:
    """For each searched option (pass, name) the values beside it and those of presets, in that order."""
    found: dict[tuple[str, str], dict[OptionValue, None]] = {}
    for preset in PRESETS:
        for pass_ in preset.build():
            for info in options_of(type(pass_)):
                if _is_searched(info, kind):
                    known = found.setdefault((pass_.name, info.name), dict.fromkeys(info.search))
                    known[option_values(pass_)[info.name]] = None
    return {key: tuple(values) for key, values in found.items()}


def _is_searched(info: OptionInfo, kind: str) -> bool:
    return bool(info.search) and (not info.search_on or kind in info.search_on)


def _shape(passes: tuple[Pass, ...], axes: tuple[Axis, ...]) -> tuple[object, ...]:
    """What two presets of one method have in common."""
    searched = {(axis.pass_name, axis.option) for axis in axes}
    return tuple(
        (pass_.name, name, value)
        for pass_ in passes
        for name, value in option_values(pass_).items()
        if (pass_.name, name) not in searched
    )
