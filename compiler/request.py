"""What one compile was asked for, checked as far as words alone can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..artifact.schema import SUFFIX
from ..codegen.base import check_installed
from ..passes.presets import preset_named
from ..spec.errors import UsageError
from ..spec.target import Target, parse_target
from ..spec.target_options import with_options
from .cache.config import CacheConfig
from .checkpoint import parse_dtype
from .source import source_name

VERIFY_LEVELS = ("off", "structure", "numerics")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """The arguments of one compile. `quant` names a preset and `recipe` a YAML file, at most one of them;
    `overrides` are `pass.option=value` and `target.option=value` texts; None for `dtype` and `kv_dtype`
    keeps the checkpoint's own precision. `verify`: `off` checks nothing, `structure` each program's form,
    `numerics` also each pass's numbers and the model's self-check. `cache` lets results of earlier
    compiles be reused. `calibration` is a file of text; `max_kl` replaces the preset's limit on the mean KL
    divergence from the unquantised model.
    """

    model: str
    output: Path | None = None
    quant: str | None = None
    target: str = "reference"
    recipe: Path | None = None
    overrides: Sequence[str] = ()
    dtype: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None
    verify: str = "numerics"
    force: bool = False
    dry_run: bool = False
    dump_ir: Path | None = None
    cache: bool = True
    calibration: Path | None = None
    max_kl: float | None = None

    def validate(self) -> None:
        """Raises UsageError for values that cannot be meant, TargetError for an unknown target, or one that
        needs a library that is not installed."""
        if self.verify not in VERIFY_LEVELS:
            raise _unknown("verification level", self.verify, VERIFY_LEVELS)
        if self.dtype is not None:
            parse_dtype(self.dtype)
        if self.quant is not None and self.recipe is not None:
            raise UsageError(
                "usage.quant_and_recipe",
                "Both a preset and a recipe file were given.",
                "A preset is a recipe of its own, so only one of --quant and --recipe can hold.",
                f"Edit the preset instead: `llmc recipe show {self.quant} > my.yaml`.",
            )
        if self.max_kl is not None and not self.max_kl > 0:
            raise UsageError(
                "usage.max_kl",
                f"The largest KL divergence allowed is {self.max_kl}.",
                "It is a number of nats above 0.",
                "Choose another --max-kl.",
            )
        if self.max_model_len is not None and self.max_model_len < 1:
            raise UsageError(
                "usage.max_model_len",
                f"The maximum model length is {self.max_model_len}.",
                "It is a number of tokens, at least 1.",
                "Choose another --max-model-len.",
            )
        check_installed(self.parsed_target)

    @property
    def parsed_target(self) -> Target:
        """The target asked for, with its options. UsageError for one that it does not have."""
        return with_options(parse_target(self.target), self.overrides)

    def kl_limit(self) -> float | None:
        """The largest mean KL divergence from the unquantised model that is let through: the one asked for,
        else the preset's; None for no limit."""
        if self.max_kl is not None or self.quant is None:
            return self.max_kl
        return preset_named(self.quant).max_kl

    def cache_config(self) -> CacheConfig:
        """The compile cache as the environment says, or one that is off."""
        config = CacheConfig.from_environment()
        return config if self.cache else replace(config, max_bytes=0)

    def output_path(self) -> Path:
        """Where the artifact goes: as asked for, or named after the model, preset and dtype, here."""
        if self.output is not None:
            return self.output
        recipe = self.recipe.stem if self.recipe is not None else self.quant
        parts = [source_name(self.model), *(part for part in (recipe, self.dtype) if part is not None)]
        return Path("-".join(parts) + SUFFIX)


def _unknown(what: str, name: str, known: Sequence[str]) -> UsageError:
    close = get_close_matches(name, known, n=1)
    return UsageError(
        f"usage.{what.replace(' ', '_')}",
        f"There is no {what} {name!r}.",
        f"There are: {', '.join(known)}.",
        f"Did you mean {close[0]}?" if close else "Choose one of these.",
    )
