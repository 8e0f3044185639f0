"""Options of passes by name: parsed from text, checked by type and range. Unknown names are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from ..spec.errors import RecipeError
from .base import OptionInfo, OptionValue, Pass, options_of

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def closest(name: str, known: Iterable[str]) -> str:
    """One sentence that leads from a misspelt name to those that exist."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Choose one of: {', '.join(names)}." if names else "There are none to choose from."


def build_pass(kind: type[Pass], values: Mapping[str, Any]) -> Pass:
    """An instance of `kind` with the options `values`, the others at their defaults.

    Raises RecipeError for an unknown option, or a value of the wrong type or outside of its range.
    """
    checked = {name: check_value(kind.name, option_named(kind, name), values[name]) for name in values}
    return kind(**checked)


def option_named(kind: type[Pass], name: str) -> OptionInfo:
    """The option `name` of a pass class. Raises RecipeError naming the closest ones."""
    known = {info.name: info for info in options_of(kind)}
    if name not in known:
        raise RecipeError(
            "recipe.unknown_option",
            f"Pass {kind.name!r} has no option {name!r}.",
            f"Its options are: {', '.join(known)}.",
            closest(name, known),
        )
    return known[name]


def parse_value(pass_name: str, info: OptionInfo, text: str) -> OptionValue:
    """The value of an option written as `text` on a command line. Raises RecipeError when it is none."""
    if info.kind is str:
        return check_value(pass_name, info, text)
    if info.kind is bool:
        if text.lower() not in _WORDS:
            raise _wrong(pass_name, info, text, "It takes true or false.")
        return _WORDS[text.lower()]
    try:
        number = int(text) if info.kind is int else float(text)
    except ValueError as error:
        what = "a whole number" if info.kind is int else "a number"
        raise _wrong(pass_name, info, text, f"It takes {what}.") from error
    return check_value(pass_name, info, number)


def check_value(pass_name: str, info: OptionInfo, value: Any) -> OptionValue:
    """`value` when it is legal for the option, a whole number widened where a float is meant.

    Raises RecipeError naming what is allowed.
    """
    if info.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not info.kind:
        raise _wrong(pass_name, info, value, f"It takes a value of type {info.kind.__name__}.")
    if info.choices and value not in info.choices:
        raise _wrong(pass_name, info, value, f"It is one of: {', '.join(map(str, info.choices))}.")
    too_low = info.low is not None and not value >= info.low
    too_high = info.high is not None and not value <= info.high
    if too_low or too_high:
        limits = (f"at least {info.low:g}" if info.low is not None else "",)
        limits += (f"at most {info.high:g}" if info.high is not None else "",)
        raise _wrong(pass_name, info, value, f"It is {' and '.join(part for part in limits if part)}.")
    return value


def _wrong(pass_name: str, info: OptionInfo, value: Any, why: str) -> RecipeError:
    return RecipeError(
        "recipe.option_value",
        f"Option {pass_name}.{info.name} cannot be {value!r}.",
        why,
        f"Its default is {info.default!r}; `llmc passes` describes it.",
    )
