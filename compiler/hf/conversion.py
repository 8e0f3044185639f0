"""How the tensors of a checkpoint become the parameters of a transformers model: its renames and its merges,
as data. Knows the names transformers gives its conversions; touches no tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping

from ...spec.errors import ModelError

# Tensors that hold no weights: tables that older transformers stored and newer ones compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")


@dataclass(frozen=True, slots=True)
class StackParts:
    """Every lane's parts become one tensor with a new dimension `dim`."""

    dim: int


@dataclass(frozen=True, slots=True)
class JoinParts:
    """All parts of all lanes are joined along `dim`."""

    dim: int


@dataclass(frozen=True, slots=True)
class SplitParts:
    """One tensor becomes one per target along `dim`: equal shares, or as long as the targets are."""

    dim: int
    equal: bool


@dataclass(frozen=True, slots=True)
class SwapDims:
    """A transpose of two dimensions; `when_needed`: only where the shape is not the target's already."""

    first: int
    second: int
    when_needed: bool


@dataclass(frozen=True, slots=True)
class Deinterleave:
    """Rows 0, 2, 4, … along `dim` come first, then 1, 3, 5, …; the other way round when `inverse`."""

    dim: int
    inverse: bool


Step = StackParts | JoinParts | SplitParts | SwapDims | Deinterleave


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored tensors that become parameters. `lanes` are groups of stored names (one group per source
    pattern, each in natural order), `targets` full parameter names; without `steps` it is a rename."""

    lanes: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """`conversions` cover every stored tensor that belongs to the model, `unexpected` are those that do
    not, `state_names` all names the model would store."""

    conversions: tuple[Conversion, ...]
    unexpected: tuple[str, ...]
    state_names: frozenset[str]


def plan_conversion(config: Any, stored: Iterable[str]) -> ConversionPlan:
    """How the tensors called `stored` become the parameters of the model that `config` describes.

    Raises ModelError for a conversion whose operation is not known here.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state: dict[str, Any] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    rename = core_model_loading.rename_source_key

    renamed: list[Conversion] = []
    unexpected: list[str] = []
    gathered: dict[str, dict[str, list[str]]] = {}
    for key in sorted(stored, key=core_model_loading.dot_natural_key):
        target, pattern = rename(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if target not in state:
            unexpected.append(key)
        elif pattern is None:
            renamed.append(Conversion(((key,),), (target,)))
        else:
            gathered.setdefault(target, {}).setdefault(pattern, []).append(key)
    converted = [
        _conversion(target, lanes, by_pattern[next(iter(lanes))], config)
        for target, lanes in gathered.items()
    ]
    ignored = _ignored(model)
    kept = tuple(key for key in unexpected if ignored.search(key) is None)
    return ConversionPlan((*renamed, *converted), kept, frozenset(state))


def _conversion(target: str, lanes: dict[str, list[str]], converter: Any, config: Any) -> Conversion:
    patterns: list[str] = list(converter.target_patterns)
    for operation in converter.operations:
        count = getattr(operation, "num_shards_attribute", None)
        if count is not None and isinstance(operation, core_model_loading.Chunk):
            shares = int(getattr(config.get_text_config(), count))
            patterns = [patterns[0].replace("*", str(index)) for index in range(shares)]
    ordered = tuple(tuple(lanes[p]) for p in converter.source_patterns if p in lanes)
    steps = tuple(_step(operation, target) for operation in converter.operations)
    return Conversion(ordered, _full_names(target, patterns), steps)


def _full_names(first: str, patterns: list[str]) -> tuple[str, ...]:
    """`first` is the full name of the first target; the others differ from it in their pattern alone."""
    if len(patterns) == 1:
        return (first,)
    before, found, behind = first.partition(patterns[0])
    if not found:
        raise _unknown(first, f"targets {patterns}")
    return tuple(before + pattern + behind for pattern in patterns)


def _step(operation: Any, target: str) -> Step:
    match type(operation).__name__:
        case "MergeModulelist":
            return StackParts(operation.dim)
        case "Concatenate":
            return JoinParts(operation.dim)
        case "Chunk":
            return SplitParts(operation.dim, equal=True)
        case "Split":
            return SplitParts(operation.dim, equal=False)
        case "Transpose":
            return SwapDims(operation.dim0, operation.dim1, getattr(operation, "check_dims", False))
        case "Interleave":
            return Deinterleave(operation.dim, getattr(operation, "inverse", False))
        case name:
            raise _unknown(target, name)


def _unknown(target: str, what: str) -> ModelError:
    return ModelError(
        "model.conversion",
        f"The checkpoint's tensors for {target!r} cannot be bound.",
        f"transformers converts them with {what}, which llmc does not know.",
        "Load the model with transformers and save_pretrained it, then compile the result.",
    )


def _ignored(model: Any) -> re.Pattern[str]:
    """Names a checkpoint may hold beside the weights: what the model itself says, and computed tables."""
    patterns: list[str] = [*(model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED]
    patterns += [re.escape(name) + "$" for name, _ in model.named_buffers()]
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
