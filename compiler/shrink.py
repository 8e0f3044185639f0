"""A small config of the same kind: fewer and narrower parts, every kind of layer kept.
Knows which sizes carry no meaning; which attributes those are is the adapter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .hf import adapter

# Layers that a small config has at most, unless it needs more to hold one of each kind.
_LAYERS = 4
_QUERIES_PER_GROUP = 4
_KV_HEADS = 2


def shrink(config: Any) -> Any:
    """A config of the same class that is small enough to be run in seconds.

    Kept: the kind of every layer (one of each at least), head widths and rope, norms, activations,
    biases, ties, soft caps. Reduced: width, vocabulary, layers, heads, experts, windows.
    """
    small = adapter.readable_copy(config)
    kept = _kept_layers(small)
    _narrow_heads(small)
    for name, cap in adapter.SIZE_CAPS.items():
        _cap(small, name, cap)
    _keep_layers(small, kept)
    _fit_groups(small)
    for name in adapter.TOKEN_IDS:
        _fit_token_ids(small, name)
    return small


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """A config with few layers, full-sized otherwise: its layer i stands for the whole model's layers
    `members[i]`, the first of which it is."""

    config: Any
    members: tuple[tuple[int, ...], ...]


def one_of_each_kind(config: Any, marks: Sequence[object] = ()) -> LayerKinds:
    """The first layer, the last one, and of those between them one of each kind: what enters the first and
    leaves the last is unlike what goes from layer to layer. Layers whose `marks` (one each, where given)
    differ are of different kinds whatever the config says. All layers, where a kind hangs on more than the
    config's lists and borders, or weights outside of the layers on how many there are."""
    whole = adapter.readable_copy(config)
    count = adapter.num_layers(whole)
    kinds = [adapter.layer_kind(whole, index) for index in range(count)]
    alike: dict[object, list[int]] = {}
    for index, kind in enumerate(kinds):
        end = index if index in (0, count - 1) else -1
        alike.setdefault((end, kind, marks[index] if marks else None), []).append(index)
    members = sorted(alike.values(), key=lambda layers: layers[0])
    small = adapter.readable_copy(config)
    _keep_layers(small, [layers[0] for layers in members])
    found = [adapter.layer_kind(small, index) for index in range(len(members))]
    if adapter.has_parts_per_layer(whole) or found != [kinds[layers[0]] for layers in members]:
        return LayerKinds(config=whole, members=tuple((index,) for index in range(count)))
    return LayerKinds(config=small, members=tuple(map(tuple, members)))


def _kept_layers(config: Any) -> list[int]:
    """Indices of the layers to keep: the first of each kind, then others from the front."""
    count = adapter.num_layers(config)
    kinds = [adapter.layer_kind(config, index) for index in range(count)]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    kept = set(first.values())
    for index in range(count):
        if len(kept) >= min(_LAYERS, count):
            break
        kept.add(index)
    return sorted(kept)


def _keep_layers(small: Any, kept: list[int]) -> None:
    count = adapter.num_layers(small)
    for name in adapter.per_layer_lists(small):
        values = getattr(small, name)
        setattr(small, name, [values[index] for index in kept])
    for name in adapter.LAYER_INDEX_LISTS:
        chosen = getattr(small, name, None)
        if chosen:
            setattr(small, name, [new for new, old in enumerate(kept) if old in chosen])
    for name in adapter.FIRST_LAYERS:  # how many layers from the front are of another kind
        border = getattr(small, name, None)
        if border:
            setattr(small, name, sum(index < border for index in kept))
    for name in adapter.LAST_LAYERS:
        border = getattr(small, name, None)
        if border:
            setattr(small, name, sum(index >= count - border for index in kept))
    adapter.set_layers(small, kept)


def _narrow_heads(small: Any) -> None:
    heads = adapter.num_heads(small)
    width = adapter.head_width(small)
    groups = adapter.num_kv_heads(small)
    new_groups = min(groups, _KV_HEADS if groups < heads else _KV_HEADS * 2)
    new_heads = new_groups * min(max(heads // groups, 1), _QUERIES_PER_GROUP)
    adapter.set_heads(small, new_heads, new_groups, min(adapter.hidden_size(small), new_heads * width))


def _cap(small: Any, name: str, cap: int) -> None:
    value = getattr(small, name, None)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        setattr(small, name, min(value, cap))
    elif isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        setattr(small, name, [min(item, cap) for item in value])


def _fit_groups(small: Any) -> None:
    """Routing in groups needs experts that the groups divide, and no more chosen than there are."""
    groups, chosen = adapter.EXPERT_GROUPS
    total = next((getattr(small, name) for name in adapter.EXPERT_COUNTS if getattr(small, name, None)), 0)
    if total and getattr(small, groups, None):
        setattr(small, groups, next(n for n in (2, 1) if total % n == 0 and n <= getattr(small, groups)))
        setattr(small, chosen, min(getattr(small, chosen), getattr(small, groups)))


def _fit_token_ids(small: Any, name: str) -> None:
    value, top = getattr(small, name, None), small.vocab_size
    if isinstance(value, int) and value >= top:
        setattr(small, name, value % top)
    elif isinstance(value, list):
        setattr(small, name, sorted({item % top for item in value}))
