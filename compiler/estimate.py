"""What a model will need before it is compiled, from its config alone: one layer of each kind is traced at
full size and counted as often as the model has it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..ir.weights import Unbound
from ..passes.base import Pass, PassContext
from ..passes.manager import run_passes
from ..passes.presets import PRESETS
from ..passes.recipes import override, preset_recipe
from ..spec.cache import CacheGroup
from ..spec.errors import LlmcError, UsageError
from ..spec.target import parse_target
from .checkpoint import parse_dtype
from .hf.configs import config_from_json
from .json_files import read_object
from .shrink import one_of_each_kind
from .trace import trace_config

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.|(?:^|\.)h\.(\d+)\.")
_KV_DTYPES = ("float8_e4m3fn", "int8", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What an artifact will need, in bytes. A request of n tokens takes `request_bytes(n)` of cache."""

    recipe: str
    num_parameters: int
    num_layers: int
    weight_bytes: int
    activation_bytes: int
    max_context: int
    caches: tuple[tuple[CacheGroup, int], ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.weight_bytes / max(1, self.num_parameters)

    def request_bytes(self, tokens: int) -> int:
        """Cache bytes of one request; windows keep no more than they see, in whole pages."""
        total = 0
        for group, count in self.caches:
            kept = tokens if group.kind == "full" else min(tokens, group.window + group.page_tokens)
            each = group.bytes_per_token // len(group.layers) * count
            total += group.pages_for(kept) * group.page_tokens * each
        return total

    def requests_within(self, memory_bytes: int, tokens: int) -> int:
        """How many requests of `tokens` tokens fit beside weights and activations."""
        left = memory_bytes - self.weight_bytes - self.activation_bytes
        return max(0, left // max(1, self.request_bytes(tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitAnswer:
    """Whether a model fits, how much of it, and what would make it fit where it does not."""

    estimate: Estimate
    memory_bytes: int
    context: int
    requests: int
    ways: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc inspect --fit --json` prints."""
        found = asdict(self.estimate)
        found.pop("caches")
        return {
            **found,
            "bits_per_weight": self.estimate.bits_per_weight,
            "request_bytes": self.estimate.request_bytes(self.context),
            "memory_bytes": self.memory_bytes,
            "context": self.context,
            "requests": self.requests,
            "fits": self.requests > 0,
            "ways": self.ways,
        }


class Estimator:
    """Estimates for one model: traced once, its passes run for each recipe asked for."""

    def __init__(self, folder: Path, *, target: str = "reference", dtype: str | None = None) -> None:
        raw = read_object(folder / "config.json")
        config = config_from_json(raw)
        stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        kinds = one_of_each_kind(config)
        self._counts = kinds.counts
        self._traced = trace_config(kinds.config, dtype=parse_dtype(dtype or stored))
        self._context = PassContext(
            target=parse_target(target), max_model_len=self._traced.spec.max_context, planning=True
        )

    def estimate(self, recipe: str, passes: Sequence[Pass]) -> Estimate:
        """The estimate for a recipe by its passes, which must plan cache and memory."""
        with torch.no_grad():
            program = run_passes(self._traced, passes, self._context)
        assert program.cache is not None
        assert program.memory is not None
        used = set(program.used_weights())
        caches = [
            (replace(group, layers=(layer,)), self._counts[layer])
            for group in program.cache.groups
            for layer in group.layers
        ]
        return Estimate(
            recipe=recipe,
            num_parameters=self._sum(
                {
                    name: math.prod(expr.shape)
                    for name, expr in self._traced.weights.entries.items()
                    if isinstance(expr, Unbound)  # buffers are constants
                }
            ),
            num_layers=sum(self._counts),
            weight_bytes=self._sum({name: program.weights.num_bytes(name) for name in used}),
            activation_bytes=program.memory.activation_bytes,
            max_context=program.spec.max_context,
            caches=tuple(caches),
        )

    def _sum(self, sizes: Mapping[str, int]) -> int:
        """Sizes by weight over the whole model: those of a layer as often as there are layers of its kind."""
        total = 0
        for name, size in sizes.items():
            match = _LAYER.search(name)
            total += size * (self._counts[int(match[1] or match[2])] if match else 1)
        return total


def answer_fit(
    folder: Path,
    *,
    memory_bytes: int,
    context: int | None = None,
    quant: str | None = None,
    target: str = "reference",
    dtype: str | None = None,
) -> FitAnswer:
    """Whether the model of `folder` (its config.json is all that is read) fits into `memory_bytes` with one
    request of `context` tokens (the model's own by default) under preset `quant`.

    Raises ModelError for a config that cannot be compiled, UsageError for a context beyond the model's.
    """
    estimator = Estimator(folder, target=target, dtype=dtype)
    name = quant or "none"
    estimate = estimator.estimate(name, preset_recipe(name).passes)
    tokens = context or estimate.max_context
    if not 1 <= tokens <= estimate.max_context:
        raise UsageError(
            "usage.context",
            f"A context of {tokens} tokens was asked for.",
            f"The model's own is {estimate.max_context} tokens.",
            "Choose one within it.",
        )
    requests = estimate.requests_within(memory_bytes, tokens)
    ways = () if requests else _ways(estimator, estimate, memory_bytes, tokens)
    return FitAnswer(
        estimate=estimate, memory_bytes=memory_bytes, context=tokens, requests=requests, ways=ways
    )


def _ways(estimator: Estimator, estimate: Estimate, memory_bytes: int, tokens: int) -> tuple[str, ...]:
    """Three ways to make it fit, each tried; more memory is the one that always works."""
    ways = [
        *_shorter_context(estimate, memory_bytes),
        *_smaller_cache(estimator, estimate.recipe, memory_bytes, tokens),
        *_fewer_bits(estimator, estimate, memory_bytes, tokens),
    ]
    need = estimate.weight_bytes + estimate.activation_bytes + estimate.request_bytes(tokens)
    ways = [*ways[:2], f"use a machine with {_gib(need)} of memory for it"]
    if len(ways) < 3:
        half = min(estimate.max_context, max(1, tokens // 2))
        least = estimate.weight_bytes + estimate.activation_bytes + estimate.request_bytes(half)
        ways.append(f"halve the context to {half} tokens and use {_gib(least)}")
    if len(ways) < 3:
        parts = math.ceil(need / max(1, memory_bytes))
        ways.append(f"choose a model of at most {max(1, estimate.num_parameters // parts):,} parameters")
    return tuple(ways)


def _shorter_context(estimate: Estimate, memory_bytes: int) -> list[str]:
    low, high = 0, estimate.max_context
    while low < high:
        middle = (low + high + 1) // 2
        if estimate.requests_within(memory_bytes, middle):
            low = middle
        else:
            high = middle - 1
    return [f"serve a context of {low} tokens (--max-model-len {low})"] if low >= 256 else []


def _smaller_cache(estimator: Estimator, recipe: str, memory_bytes: int, tokens: int) -> list[str]:
    for dtype in _KV_DTYPES[::-1]:
        try:
            passes = override(preset_recipe(recipe), [f"kv_layout.dtype={dtype}"]).passes
            found = estimator.estimate(recipe, passes)
        except LlmcError:
            continue  # this version, or this target, keeps no cache in it
        if found.requests_within(memory_bytes, tokens):
            return [f"keep the cache as {dtype} (--kv-dtype {dtype})"]
    return []


def _fewer_bits(estimator: Estimator, estimate: Estimate, memory_bytes: int, tokens: int) -> list[str]:
    found: list[str] = []
    for preset in PRESETS:
        if preset.name == estimate.recipe:
            continue
        try:
            other = estimator.estimate(preset.name, preset.build())
        except LlmcError:
            continue  # the preset is not for this model or target
        if other.weight_bytes < estimate.weight_bytes and other.requests_within(memory_bytes, tokens):
            bits = f"{other.bits_per_weight:.2f} bits a weight, {_gib(other.weight_bytes)}"
            found.append(f"quantise further: --quant {preset.name} ({bits})")
            if len(found) == 2:
                break
    return found


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
