"""A model with one layer of each kind, which stands for all layers of that kind: small to trace, whole to
count. Knows names of layers; evaluates nothing but the small tensors that say how codes are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..ir.program import Program
from ..ir.weights import Unbound
from ..spec.cache import CacheGroup, CacheLayout
from ..spec.errors import ModelError
from .bind import bind_checkpoint
from .checkpoint import Checkpoint, Described, precision_of, read_config
from .hf import adapter
from .shards import StoredTensor, holds_weights, list_tensors
from .shrink import LayerKinds, one_of_each_kind
from .tokenizer_files import TokenizerFiles
from .trace import trace_config

_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedModel:
    """A program before any pass; its layer i stands for the model's layers `members[i]`. `parameter_shapes`
    are those of the traced model, whatever its weights are stored as."""

    program: Program
    members: tuple[tuple[int, ...], ...]
    parameter_shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return self.total({name: math.prod(shape) for name, shape in self.parameter_shapes.items()})

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return sum(map(len, self.members))

    def total(self, sizes: Mapping[str, int]) -> int:
        """Sizes by weight over the whole model: those of a layer as often as there are layers of its kind."""
        return sum(size * self._count(name) for name, size in sizes.items())

    def unfolded(self, cache: CacheLayout) -> CacheLayout:
        """The layout of the whole model: each layer's cache with all layers of its kind."""
        return CacheLayout(groups=tuple(map(self._unfolded_group, cache.groups)))

    def _unfolded_group(self, group: CacheGroup) -> CacheGroup:
        layers = sorted(index for layer in group.layers for index in self.members[layer])
        readers = sorted(
            (index, self.members[owner][-1])
            for reader, owner in group.shared
            for index in self.members[reader]
        )
        return replace(group, layers=tuple(layers), shared=tuple(readers))

    def _count(self, name: str) -> int:
        match = _LAYER.search(name)
        return len(self.members[int(match[3])]) if match else 1


def fold_model(folder: Path, *, dtype: torch.dtype | None, max_context: int | None) -> FoldedModel:
    """The model of `folder` folded, in `dtype` (its own by default), for `max_context` tokens.

    config.json is all that it needs. Where there are weights their headers are read: they say how codes
    are stored, and layers stored differently are of different kinds. Raises ModelError for a model that
    cannot be compiled, for weights that do not belong to it, and where config.json alone does not say enough.
    """
    described = read_config(folder)
    if not holds_weights(folder):
        return _fold_config(described, dtype or _declared(folder, described), max_context)
    tensors = list_tensors(folder)
    kinds = one_of_each_kind(described.config, _marks(tensors, adapter.num_layers(described.config)))
    chosen = dtype or precision_of(folder.name, described, tensors)
    try:
        folded = _checkpoint(folder, described, kinds.config, _folded(tensors, kinds))
        traced = trace_config(kinds.config, dtype=chosen, max_context=max_context)
        program = bind_checkpoint(traced, folded)
    except ModelError:
        # The same is wrong with the whole model; its layers bear the names that the user knows.
        whole = trace_config(described.config, dtype=chosen, max_context=max_context)
        bind_checkpoint(whole, _checkpoint(folder, described, described.config, tensors))
        raise
    return FoldedModel(program=program, members=kinds.members, parameter_shapes=_parameter_shapes(traced))


def _fold_config(described: Described, dtype: torch.dtype, max_context: int | None) -> FoldedModel:
    kinds = one_of_each_kind(described.config)
    program = trace_config(kinds.config, dtype=dtype, max_context=max_context)
    return FoldedModel(program=program, members=kinds.members, parameter_shapes=_parameter_shapes(program))


def _parameter_shapes(traced: Program) -> dict[str, tuple[int, ...]]:
    entries = traced.weights.entries.items()
    return {name: expr.shape for name, expr in entries if isinstance(expr, Unbound)}


def _declared(folder: Path, described: Described) -> torch.dtype:
    if described.form is not None:
        raise ModelError(
            "model.no_headers",
            f"{folder.name} is a quantised model without its weights.",
            "Which weights are stored as codes, and how, is said by the headers of the safetensors files.",
            "Put the weights beside config.json, or ask about the unquantised model with --quant.",
        )
    if described.declared_dtype is None:
        raise ModelError(
            "model.no_dtype",
            f"config.json of {folder.name} states no precision that a program can compute in.",
            "It has no `dtype` of float32, bfloat16 or float16, and there are no weights to ask.",
            "Say which with --dtype.",
        )
    return described.declared_dtype


def _checkpoint(
    folder: Path, described: Described, config: object, tensors: Mapping[str, StoredTensor]
) -> Checkpoint:
    no_tokenizer = TokenizerFiles(files=(), chat_template=None, generation={})
    return Checkpoint(
        folder=folder,
        config=config,
        raw_config=described.raw,
        tensors=tensors,
        tokenizer=no_tokenizer,
        form=described.form,
    )


def _marks(tensors: Mapping[str, StoredTensor], num_layers: int) -> list[object]:
    """What is stored of each layer: names, shapes and dtypes."""
    found: list[set[object]] = [set() for _ in range(num_layers)]
    for name, tensor in tensors.items():
        match = _LAYER.search(name)
        if match and int(match[3]) < num_layers:
            found[int(match[3])].add((name[match.end() :], tensor.shape, tensor.dtype))
    return [frozenset(parts) for parts in found]


def _folded(tensors: Mapping[str, StoredTensor], kinds: LayerKinds) -> dict[str, StoredTensor]:
    """The tensors of the layers that are kept, renumbered, and those of no layer."""
    places = {layers[0]: new for new, layers in enumerate(kinds.members)}
    total = sum(map(len, kinds.members))
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.search(name)
        index = int(match[3]) if match else None
        if match is None or index is None or index >= total:
            found[name] = tensor
        elif index in places:
            found[f"{name[: match.start(3)]}{places[index]}{name[match.end(3) :]}"] = tensor
    return found
