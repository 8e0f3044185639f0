"""Will it fit? The answer for a model that is not compiled yet, with ways to make it fit: each was estimated
like the model itself, and is told with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..codegen.base import default_target
from ..passes.base import Pass
from ..passes.recipes import override, preset_recipe
from ..runtime.fit import Fit, longest_request, size_text, unit_of
from ..spec.errors import LlmcError, UsageError
from ..spec.target import parse_target
from .checkpoint import parse_dtype
from .estimate import Estimate, Estimator, FileBytes

# Presets from the largest to the smallest, one of each size.
_LADDER = ("none", "int8", "int4", "int3")
_CODED_CACHES = ("int8", "fp8")
_NUM_WAYS = 3
# A context shorter than this is no way to serve anything.
_SHORTEST = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What shall fit: a preset, a dtype of the cache (`auto` is the target's), tokens a request, memory."""

    quant: str
    kv_dtype: str
    context: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Something else to ask for, which fits: `requests` requests at a time."""

    text: str
    asked: Asked
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FitAnswer:
    """Whether a model fits, how much of it, and three ways to make it fit where it does not."""

    asked: Asked
    target: str
    estimate: Estimate
    fit: Fit
    files: FileBytes
    ways: tuple[Way, ...]

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc inspect MODEL --fit --json` prints. Sizes in bytes."""
        return {
            "recipe": self.estimate.recipe,
            "target": self.target,
            "num_parameters": self.estimate.num_parameters,
            "num_layers": self.estimate.num_layers,
            "bits_per_weight": self.estimate.bits_per_weight,
            "max_context": self.estimate.max_context,
            "weight_bytes": self.fit.weight_bytes,
            "activation_bytes": self.fit.activation_bytes,
            "request_bytes": self.fit.request_bytes,
            "stored_weight_bytes": self.files.weights,
            "kv_dtype": self.asked.kv_dtype,
            "context": self.asked.context,
            "memory_bytes": self.asked.memory_bytes,
            "needed_bytes": self.fit.needed_bytes,
            "requests": self.fit.requests,
            "fits": self.fit.requests > 0,
            "ways": [{"text": way.text, **asdict(way.asked), "requests": way.requests} for way in self.ways],
        }


def answer_fit(
    folder: Path,
    *,
    memory_bytes: int,
    context: int | None = None,
    quant: str | None = None,
    kv_dtype: str | None = None,
    target: str | None = None,
    dtype: str | None = None,
) -> FitAnswer:
    """Whether the model of `folder` fits into `memory_bytes` with one request of `context` tokens (the
    model's own by default) under preset `quant`; config.json is all that it needs.

    Raises ModelError for a config that cannot be compiled, UsageError for a context beyond the model's,
    TargetError for what the target (this machine's own by default) has no form for.
    """
    chosen = parse_target(target or default_target())
    estimator = Estimator(folder, target=chosen, dtype=None if dtype is None else parse_dtype(dtype))
    quant, kv_dtype = quant or "none", kv_dtype or "auto"
    passes = _passes(quant, kv_dtype)
    estimate = estimator.estimate(quant, passes)
    asked = Asked(
        quant=quant,
        kv_dtype=kv_dtype,
        context=_checked(estimate.max_context if context is None else context, estimate.max_context),
        memory_bytes=memory_bytes,
    )
    files = estimator.file_bytes(passes)
    fit = estimate.fit(memory_bytes, asked.context)
    ways = () if fit.requests else ways_to_fit(estimator, asked)
    return FitAnswer(asked=asked, target=chosen.name, estimate=estimate, fit=fit, files=files, ways=ways)


def ways_to_fit(estimator: Estimator, asked: Asked) -> tuple[Way, ...]:
    """Three other settings that fit where `asked` does not: within the memory and the context, with a shorter
    context, with more memory. Those that change the text least come first."""
    return _Search(estimator).ways(asked)


def _passes(quant: str, kv_dtype: str) -> tuple[Pass, ...]:
    return override(preset_recipe(quant), [f"kv_layout.dtype={kv_dtype}"]).passes


def _checked(tokens: int, most: int) -> int:
    if 1 <= tokens <= most:
        return tokens
    raise UsageError(
        "usage.context",
        f"A context of {tokens} tokens was asked for.",
        f"The model's own is {most} tokens.",
        "Choose one within it.",
    )


class _Search:
    """Looks for other settings that fit. Each recipe is estimated at most once."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._known: dict[tuple[str, str], Estimate | None] = {}

    def ways(self, asked: Asked) -> tuple[Way, ...]:
        """The first three that fit."""
        found: list[Way] = []
        for way in self._candidates(asked):
            if all(way.asked != other.asked for other in found):
                found.append(way)
            if len(found) == _NUM_WAYS:
                break
        return tuple(found)

    def _candidates(self, asked: Asked) -> Iterator[Way]:
        yield from self._within(asked)
        yield from self._shorter(asked, asked.quant)
        smallest = self._smallest(asked)
        yield from self._shorter(asked, smallest)
        for quant in dict.fromkeys((asked.quant, smallest, "int4", "int8", "none")):
            yield from self._larger(asked, quant, asked.kv_dtype, asked.context)
        yield from self._larger(asked, smallest, asked.kv_dtype, max(1, asked.context // 2))
        yield from self._larger(asked, asked.quant, asked.kv_dtype, max(1, asked.context // 2))

    def _within(self, asked: Asked) -> Iterator[Way]:
        """A cache in fewer bits, then weights in fewer bits, then both."""
        smaller = self._below(asked.quant)
        coded = [dtype for dtype in _CODED_CACHES if asked.kv_dtype == "auto"][:1]
        settings = [
            *((asked.quant, dtype) for dtype in coded),
            *((quant, asked.kv_dtype) for quant in smaller),
            *((quant, dtype) for quant in smaller for dtype in coded),
        ]
        for quant, kv_dtype in settings:
            way = self._way(
                Asked(quant=quant, kv_dtype=kv_dtype, context=asked.context, memory_bytes=asked.memory_bytes),
                _settings_text(asked, quant, kv_dtype),
            )
            if way is not None:
                yield way

    def _shorter(self, asked: Asked, quant: str) -> Iterator[Way]:
        estimate = self._possible(quant, asked.kv_dtype)
        if estimate is None:
            return
        tokens = longest_request(estimate.plan, estimate.cache, asked.context, asked.memory_bytes)
        if tokens >= _SHORTEST:
            shorter = Asked(
                quant=quant, kv_dtype=asked.kv_dtype, context=tokens, memory_bytes=asked.memory_bytes
            )
            more = "" if quant == asked.quant else f" with --quant {quant}"
            way = self._way(shorter, f"serve at most {tokens} tokens (--max-model-len {tokens}){more}")
            if way is not None:
                yield way

    def _larger(self, asked: Asked, quant: str, kv_dtype: str, context: int) -> Iterator[Way]:
        estimate = self._possible(quant, kv_dtype)
        if estimate is None:
            return
        need = _in_tenths(estimate.fit(asked.memory_bytes, context).needed_bytes)
        more = Asked(quant=quant, kv_dtype=kv_dtype, context=context, memory_bytes=need)
        changed = [f"--quant {quant}"] * (quant != asked.quant)
        changed += [f"a context of {context} tokens"] * (context != asked.context)
        also = f" with {' and '.join(changed)}" if changed else ""
        way = self._way(more, f"use a machine with {size_text(need, 1)} of memory{also}")
        if way is not None:
            yield way

    def _below(self, quant: str) -> tuple[str, ...]:
        """Presets with fewer bits than `quant`, the largest first."""
        own = self._possible(quant, "auto")
        found = [(name, self._possible(name, "auto")) for name in _LADDER if name != quant]
        return tuple(
            name
            for name, other in found
            if other is not None and own is not None and other.plan.weight_bytes < own.plan.weight_bytes
        )

    def _smallest(self, asked: Asked) -> str:
        return (asked.quant, *self._below(asked.quant))[-1]

    def _possible(self, quant: str, kv_dtype: str) -> Estimate | None:
        """The estimate for settings, None where a pass refuses them for this model or target."""
        if (quant, kv_dtype) not in self._known:
            try:
                found = self._estimator.estimate(quant, _passes(quant, kv_dtype))
            except LlmcError:
                found = None
            self._known[quant, kv_dtype] = found
        return self._known[quant, kv_dtype]

    def _can_be_built(self, quant: str, kv_dtype: str) -> bool:
        """Whether the target has a form for every node and for the cache."""
        try:
            self._estimator.file_bytes(_passes(quant, kv_dtype))
        except LlmcError:
            return False
        return True

    def _way(self, asked: Asked, text: str) -> Way | None:
        estimate = self._possible(asked.quant, asked.kv_dtype)
        if estimate is None:
            return None
        fit = estimate.fit(asked.memory_bytes, asked.context)
        if not fit.requests or not self._can_be_built(asked.quant, asked.kv_dtype):
            return None
        size = f"{estimate.bits_per_weight:.2f} bits a weight, {_size(fit.weight_bytes)} of weights"
        cache = f"{_size(fit.request_bytes)} a request"
        counted = f"{fit.requests} request{'s' if fit.requests > 1 else ''} of {asked.context} tokens"
        return Way(text=f"{text}: {size}, {cache}, {counted}", asked=asked, requests=fit.requests)


def _settings_text(asked: Asked, quant: str, kv_dtype: str) -> str:
    parts: list[str] = []
    if quant != asked.quant:
        parts.append(f"quantise the weights (--quant {quant})")
    if kv_dtype != asked.kv_dtype:
        parts.append(f"keep the cache in 8 bits (--kv-dtype {kv_dtype})")
    return " and ".join(parts)


def _in_tenths(count: int) -> int:
    """Bytes rounded up to a tenth of the unit that they are told in, so that the number as told is enough."""
    tenth = unit_of(count)[0] / 10
    return math.floor(math.ceil(count / tenth) * tenth)


def _size(count: int) -> str:
    return size_text(count, 2 if count < 10 * 2**30 else 1)
