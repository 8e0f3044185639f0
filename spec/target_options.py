"""What can be asked of a target with `--set KIND.OPTION=VALUE`, as a table, and reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from .errors import UsageError
from .target import OptionValue, Target

_BOOLS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOption:
    """One option: its default, which says its type, what it may be, and what it does."""

    name: str
    default: OptionValue
    help: str
    choices: tuple[str, ...] = ()
    low: int = 0

    @property
    def values(self) -> str:
        """What it may be, in words."""
        if isinstance(self.default, bool):
            return "true or false"
        return " or ".join(self.choices) if self.choices else f"a number, at least {self.low}"

    def parse(self, text: str) -> OptionValue | None:
        """The value that `text` says; None where it says none."""
        if isinstance(self.default, bool):
            return _BOOLS.get(text)
        if self.choices:
            return text if text in self.choices else None
        return int(text) if text.isdigit() and int(text) >= self.low else None


TARGET_OPTIONS: dict[str, tuple[TargetOption, ...]] = {
    "onnx": (
        TargetOption(
            name="contrib",
            default=True,
            help="Use ONNX Runtime's own operators, which are faster; otherwise standard ones alone.",
        ),
        TargetOption(
            name="logits",
            default="last",
            choices=("last", "all"),
            help="Logits of each sequence's last token, or of every one (which speculation needs).",
        ),
        TargetOption(
            name="file_bytes",
            default=4 * 2**30,
            low=2**20,
            help="Most bytes of one file of weights, a larger tensor excepted.",
        ),
    )
}


def is_target_option(text: str) -> bool:
    """Whether the override `text` (`NAME.OPTION=VALUE`) is of a target, not of a pass."""
    return text.partition(".")[0] in TARGET_OPTIONS


def with_options(target: Target, overrides: Sequence[str]) -> Target:
    """`target` with its options: their defaults, changed by those of `overrides` that are of a target.

    Raises UsageError for an unknown option or value, and for an option of another target.
    """
    known = {option.name: option for option in TARGET_OPTIONS.get(target.kind, ())}
    options = {option.name: option.default for option in known.values()}
    for text in filter(is_target_option, overrides):
        key, _, value = text.partition("=")
        kind, _, name = key.partition(".")
        if kind != target.kind:
            raise UsageError(
                "usage.target_option",
                f"The option {key!r} is of the target {kind!r}.",
                f"This compile is for {target.name!r}.",
                f"Leave it out, or compile with --target {kind}.",
            )
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise UsageError(
                "usage.target_option",
                f"The target {kind!r} has no option {name!r}.",
                f"Its options are: {', '.join(known)}.",
                f"Did you mean {kind}.{close[0]}?" if close else "`llmc targets` says what each does.",
            )
        parsed = known[name].parse(value)
        if parsed is None:
            raise UsageError(
                "usage.target_option",
                f"The option {key} cannot be {value!r}.",
                f"It is {known[name].values}.",
                "Choose another value.",
            )
        options[name] = parsed
    return replace(target, options=options)
