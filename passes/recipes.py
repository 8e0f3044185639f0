"""Recipes: an ordered list of passes with options, in Python and as YAML, with overrides by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from ..spec.errors import RecipeError
from ..spec.target_options import is_target_option
from .base import PAGED, TRACED, OptionValue, Pass, Stage, option_values, options_of
from .manager import check_order
from .options import build_pass, closest, option_named, parse_value
from .presets import PRESETS, preset_named
from .registry import known_passes, pass_named
from .strict_yaml import load_yaml

VERSION = 1
_KEYS = ("version", "name", "passes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Passes in the order they run, and what the whole is called."""

    name: str
    passes: tuple[Pass, ...]


class RecipeRequest(Protocol):
    """What a caller says about the recipe it wants: a preset or a file (or neither), and changes to it."""

    @property
    def quant(self) -> str | None:
        """Name of a preset."""
        ...

    @property
    def recipe(self) -> Path | None:
        """A YAML recipe."""
        ...

    @property
    def overrides(self) -> Sequence[str]:
        """Texts `pass.option=value`; those of targets are not looked at."""
        ...

    @property
    def kv_dtype(self) -> str | None:
        """Dtype of the cache; the same as overriding `kv_layout.dtype`."""
        ...


def recipe_for(request: RecipeRequest) -> Recipe:
    """The recipe that `request` asks for, overrides applied and checked.

    Raises RecipeError for an unknown preset, pass, option or value, an unreadable file, and passes that
    do not fit together.
    """
    if request.recipe is not None:
        recipe = read_recipe(request.recipe)
    else:
        recipe = preset_recipe(request.quant or "none")
    overrides = [text for text in request.overrides if not is_target_option(text)]
    if request.kv_dtype is not None:
        overrides.append(f"kv_layout.dtype={request.kv_dtype}")
    recipe = override(recipe, overrides)
    check_recipe(recipe)
    return recipe


def preset_recipe(name: str) -> Recipe:
    """The preset called `name` as a recipe. Raises RecipeError naming the closest ones."""
    return Recipe(name=name, passes=preset_named(name).build())


def check_recipe(recipe: Recipe) -> None:
    """Check that a recipe takes a traced program to one that an executor can run.

    Raises RecipeError for passes out of order, a required fact that no pass provides, and a recipe
    that never reaches a paged program.
    """
    check_order(recipe.passes, (TRACED,))
    if not any(PAGED in pass_.provides for pass_ in recipe.passes):
        raise RecipeError(
            "recipe.unfinished",
            f"Recipe {recipe.name!r} makes no program that can be served.",
            "None of its passes lays out the paged cache.",
            "Add kv_layout and paged_attention after the passes of the quantise stage.",
        )


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with options replaced by texts `pass.option=value`, in order. A pass that prepares weights for
    rounding (it has a true attribute `prepares`) is put in where the recipe does not have it.

    Raises RecipeError for a text of another form, and for any other pass that the recipe does not have or
    has more than once.
    """
    passes = list(recipe.passes)
    for text in overrides:
        target, equals, value = text.partition("=")
        name, dot, option = target.strip().partition(".")
        if not (equals and dot and name and option):
            raise RecipeError(
                "recipe.override_form",
                f"Override {text!r} cannot be read.",
                "An override has the form pass.option=value.",
                "Write it like rtn.bits=4.",
            )
        _put_in(passes, name)
        index = _index_of(passes, name)
        kind = type(passes[index])
        parsed = parse_value(name, option_named(kind, option), value.strip())
        passes[index] = build_pass(kind, option_values(passes[index]) | {option: parsed})
    return Recipe(name=recipe.name, passes=tuple(passes))


def _put_in(passes: list[Pass], name: str) -> None:
    """Insert pass `name`, if it prepares and is missing, before the first that it comes before in a pipeline;
    not where nothing rounds weights."""
    kind = known_passes().get(name)
    if kind is None or not getattr(kind, "prepares", False) or any(pass_.name == name for pass_ in passes):
        return
    order = list(known_passes())
    later = [
        index
        for index, pass_ in enumerate(passes)
        if pass_.stage is Stage.quantise and order.index(pass_.name) > order.index(name)
    ]
    if later:
        passes.insert(later[0], kind())


def _index_of(passes: Sequence[Pass], name: str) -> int:
    found = [index for index, pass_ in enumerate(passes) if pass_.name == name]
    if len(found) == 1:
        return found[0]
    pass_named(name)
    problem = f"has pass {name!r} {len(found)} times" if found else f"does not have pass {name!r}"
    fix = "Edit the recipe instead: `llmc recipe show` prints one to start from."
    raise RecipeError(
        "recipe.override_target",
        f"Pass {name!r} cannot be overridden.",
        f"The recipe {problem}.",
        fix if found else f"{closest(name, {pass_.name for pass_ in passes})} {fix}",
    )


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, stages as comments; inverse of `from_yaml`.

    All options are written, so that the text means the same when a default changes, but for an
    expectation of nothing.
    """
    lines = [_dump({"version": VERSION}), _dump({"name": recipe.name}), "passes:"]
    stage: Stage | None = None
    for pass_ in recipe.passes:
        if pass_.stage is not stage:
            stage = pass_.stage
            lines.append(f"  # {stage.name}")
        options = _written_options(pass_)
        lines.append(f"  - {pass_.name}" + (":" if options else ""))
        lines.extend(f"      {_dump({name: value})}" for name, value in options.items())
    return "\n".join(lines) + "\n"


def _written_options(pass_: Pass) -> dict[str, OptionValue]:
    defaults = {info.name: info.default for info in options_of(type(pass_))}
    values = option_values(pass_)
    if values.get("expect") == defaults.get("expect"):
        values.pop("expect", None)
    return values


def _dump(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=False, width=1000).strip()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError when it cannot be read or means nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        is_preset = str(path) in {preset.name for preset in PRESETS}
        raise RecipeError(
            "recipe.unreadable",
            f"Recipe file {path} cannot be read.",
            f"The reason is: {reason}.",
            f"{path} is a preset: name it with --quant {path}."
            if is_preset
            else "Check the path; `llmc recipe show int4 > my.yaml` writes a recipe to start from.",
        ) from error
    return from_yaml(text, str(path))


def from_yaml(text: str, where: str = "recipe") -> Recipe:
    """The recipe that a YAML text describes; `where` names the text in errors.

    Raises RecipeError for broken YAML, unknown keys, passes or options, and values that do not fit.
    """
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise _malformed(where, f"it is {_kind(data)}, not a mapping")
    for key in data:
        if key not in _KEYS:
            raise _malformed(where, f"it has an unknown key {key!r}")
    if data.get("version") != VERSION:
        raise _malformed(where, f"its version is {data.get('version')!r}, and this llmc reads {VERSION}")
    if not isinstance(data.get("name"), str) or not isinstance(data.get("passes"), list):
        raise _malformed(where, "it needs a name (a text) and passes (a list)")
    return Recipe(name=data["name"], passes=tuple(_read_pass(item, where) for item in data["passes"]))


def _read_pass(item: Any, where: str) -> Pass:
    if isinstance(item, str):
        return build_pass(pass_named(item), {})
    if not isinstance(item, dict) or len(item) != 1:
        raise _malformed(where, f"the pass {item!r} is neither a name nor one name with options")
    ((name, options),) = item.items()
    if not isinstance(name, str) or not isinstance(options, dict | None):
        raise _malformed(where, f"the options of pass {name!r} are {_kind(options)}, not a mapping")
    return build_pass(pass_named(name), options or {})


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _malformed(where: str, why: str) -> RecipeError:
    return RecipeError(
        "recipe.malformed",
        f"Recipe {where} is not one.",
        f"In it, {why}." if not why.startswith("it ") else f"The reason: {why}.",
        "`llmc recipe show int4` prints a recipe of the right form.",
    )
