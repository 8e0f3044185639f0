"""In-place operators of an exported graph become functional ones where that is plainly safe: on a fresh
tensor, or on a slice of one. Knows aliasing; leaves whatever is less plain to torch.export."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

_aten = torch.ops.aten
# Composite operators whose result may share memory with their input although no schema says so.
_MAYBE_VIEWS = frozenset(
    """
    to reshape contiguous type_as flatten expand_as unflatten chunk split tensor_split narrow movedim view_as
    reshape_as ravel float half bfloat16 double pin_memory
    """.split()  # noqa: SIM905
)
_SLICES = {_aten.slice.Tensor: _aten.slice_scatter.default, _aten.select.int: _aten.select_scatter.default}


def writes(node: fx.Node) -> bool:
    """Whether `node` changes one of its inputs."""
    return isinstance(node.target, OpOverload) and _schema(node.target).is_mutable


def functionalise(graph: fx.Graph) -> fx.Graph | None:
    """A copy of `graph` without operators that write, or None when a write is not plainly safe to replace.

    Values in `meta` are kept. The result computes the same as `graph`.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    order = {node: index for index, node in enumerate(copy.nodes)}
    for node in list(copy.nodes):
        if writes(node) and not _replace_write(copy, node, order):
            return None
    return copy


def _replace_write(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    target = node.args[0]
    functional = _functional(node.target)
    if functional is None or not isinstance(target, fx.Node):
        return False
    if _is_fresh(target, node, order):
        with graph.inserting_before(node):
            value = _like(_call(graph, functional, node), target)
        _use_from(target, value, node, order)
    elif target.target in _SLICES and _writes_through(target, node, order):
        base = target.args[0]
        assert isinstance(base, fx.Node)
        with graph.inserting_before(node):
            value = _like(_call(graph, functional, node), target)
            arguments = (base, value, *target.args[1:])
            whole = _like(graph.call_function(_SLICES[cast(Any, target.target)], arguments), base)
        order[whole] = order[node]
        _use_from(base, whole, node, order, keep=(target, whole))
        _use_from(target, value, node, order)
    else:
        return False
    order[value] = order[node]
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return True


def _functional(target: Any) -> OpOverload | None:
    """The operator that returns what `target` writes to its first argument; None when there is none."""
    packet, overload = str(target).removeprefix("aten.").split(".")
    found = getattr(_aten, packet[:-1], None) if packet.endswith("_") else None
    return getattr(found, overload, None) if found is not None else None


def _call(graph: fx.Graph, functional: OpOverload, node: fx.Node) -> fx.Node:
    return graph.call_function(functional, node.args, node.kwargs)


def _is_fresh(target: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the memory of `target` is that of an earlier result, and nothing else that shares it is read
    after `write`."""
    return not _read_through_others(target, write, write, order) and _owns_memory(target, write, order)


def _owns_memory(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `node` is a result, or a view of one that nothing else reads after `write`."""
    if node.op != "call_function":
        return False
    while _may_share(node):
        base = node.args[0] if node.args else None
        if not isinstance(base, fx.Node) or base.op != "call_function":
            return False
        if any(order[user] > order[write] for user in base.users if user is not node):
            return False
        if _read_through_others(base, node, write, order):
            return False
        node = base
    return True


def _read_through_others(node: fx.Node, via: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a user of `node` other than `via` may share its memory and is read after `write`."""
    return any(
        _may_share(user) and any(order[reader] > order[write] for reader in user.users)
        for user in node.users
        if user is not via and user is not write and not writes(user)
    )


def _writes_through(view: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `view` is a slice of a fresh tensor, and the only view of it in use from `write` on."""
    base = view.args[0]
    if not isinstance(base, fx.Node) or not _owns_memory(base, write, order):
        return False
    others = [user for user in base.users if user is not view and _may_share(user)]
    if any(_may_share(user) for user in view.users if not writes(user)):
        return False
    return not any(
        order[reader] > order[write] and order[user] < order[write]
        for user in others
        for reader in user.users
    )


def _may_share(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # one of several results
        producer = node.args[0]
        return not isinstance(producer, fx.Node) or _may_share(producer)
    if not isinstance(node.target, OpOverload):
        return True
    if node.target.name().split("::")[1].split(".")[0] in _MAYBE_VIEWS:
        return True
    return any(result.alias_info is not None for result in _schema(node.target).returns)


def _use_from(
    old: fx.Node,
    new: fx.Node,
    after: fx.Node,
    order: dict[fx.Node, int],
    keep: tuple[fx.Node, ...] = (),
) -> None:
    """Let readers of `old` that come after the write read `new`."""
    for user in list(old.users):
        if user not in keep and user is not new and user is not after and order.get(user, -1) > order[after]:
            user.replace_input_with(old, new)


def _like(node: fx.Node, other: fx.Node) -> fx.Node:
    node.meta = dict(other.meta)
    value = node.meta.get("val")
    assert isinstance(value, Tensor)
    return node


def _schema(target: OpOverload) -> Any:
    return target._schema  # pyright: ignore[reportPrivateUsage]


def join_slices(graph: fx.Graph) -> None:
    """Rewrite, in place, a tensor that is allocated empty and filled slice by slice into one `cat`."""
    for node in list(graph.nodes):
        if node.target is _aten.copy.default and _same_type(node, node.args[1]):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    for node in list(graph.nodes):
        parts = _filling(node)
        if parts is not None:
            with graph.inserting_before(node):
                whole = _like(graph.call_function(_aten.cat.default, (parts, node.args[2])), node)
            node.replace_all_uses_with(whole)


def _filling(node: fx.Node) -> list[fx.Node] | None:
    """The parts of a chain of `slice_scatter` that covers an empty tensor, first to last; else None."""
    parts: list[fx.Node] = []
    if node.target is not _aten.slice_scatter.default or any(
        _scatters_into(user, node) for user in node.users
    ):
        return None
    dim = node.args[2]
    size, stop = node.meta["val"].shape[dim], node.meta["val"].shape[dim]
    link: Any = node
    base: Any
    while link.target is _aten.slice_scatter.default:
        written: tuple[Any, ...] = (*link.args, *_DEFAULTS[len(link.args) :])
        base, part, at, start, end, *step = written
        if at != dim or step != [1] or min(end, size) != stop or not isinstance(start, int):
            return None
        parts.insert(0, part)
        stop, link = start, base
    empty = link.target in (_aten.new_empty.default, _aten.empty.memory_format)
    return parts if empty and stop == 0 else None


_DEFAULTS = (None, None, 0, 0, 2**63 - 1, 1)


def _same_type(node: fx.Node, other: Any) -> bool:
    before, after = other.meta["val"], node.meta["val"]
    return before.dtype == after.dtype and before.shape == after.shape


def _scatters_into(user: fx.Node, node: fx.Node) -> bool:
    return user.target is _aten.slice_scatter.default and user.args[0] is node
