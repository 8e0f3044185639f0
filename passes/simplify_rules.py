"""The rules of `simplify`, one operator each: a node in, an equal and simpler one out, or None.

A rule may insert nodes at the graph's insertion point, which is just before the node it looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .graph import argument
from .rewrite import (
    CASTS,
    COPIES,
    LAST_DIM,
    RESHAPES,
    at,
    aten,
    counted,
    dtype_of,
    insert,
    is_one,
    is_tensor,
    operator_of,
    rank_of,
    reshape_sizes,
    same_shape,
    shape_of,
)

Rule = Callable[[fx.Node], fx.Node | None]


def simplified(node: fx.Node) -> fx.Node | None:
    """An equal, simpler node for `node`, or None when it is simple."""
    name = operator_of(node)
    if name in COPIES:
        return None if _needs_strides(node) else _source(node)
    if name in CASTS:
        return _cast(node)
    if name in RESHAPES:
        return _reshape(node)
    if name in LAST_DIM or name == "linear":
        return _without_leading_ones(node)
    rule = _RULES.get(name)
    return rule(node) if rule is not None else None


def _needs_strides(copy: fx.Node) -> bool:
    """Whether a user reads memory as another type, which takes the strides that the copy made."""
    return any(operator_of(user) == "view_as_complex" for user in copy.users)


def permuted(source: fx.Node, dims: list[int]) -> fx.Node:
    """`source` with its dimensions in the order `dims`: itself, a reshape, or one permute."""
    if operator_of(source) == "permute":
        inner: list[int] = argument(source, "dims")
        source, dims = _source(source), [at(inner[dim], len(inner)) for dim in dims]
    if dims == list(range(len(dims))):
        return source
    shape = shape_of(source)
    moved = [dim for dim in dims if not is_one(shape[dim])]
    sizes = reshape_sizes([shape[dim] for dim in dims])
    value = source.meta["val"].permute(dims)
    if moved == sorted(moved) and sizes is not None:
        return insert(source.graph, aten.reshape.default, (source, sizes), like=value)
    return insert(source.graph, aten.permute.default, (source, dims), like=value)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _is_plain(node: fx.Node, operator: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether `node` is written in exactly this form already."""
    return node.target is operator and list(node.args) == list(args) and not node.kwargs


def _cast(node: fx.Node) -> fx.Node | None:
    source, dtype = _source(node), dtype_of(node)
    inner = source
    while operator_of(inner) in CASTS and _holds(dtype_of(inner), dtype_of(_source(inner))):
        inner = _source(inner)
    if dtype_of(inner) == dtype:
        return inner
    if inner is source and node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": dtype}:
        return None
    return insert(node.graph, aten._to_copy.default, (inner,), like=node.meta["val"], dtype=dtype)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if narrow.is_floating_point != wide.is_floating_point or narrow.is_complex != wide.is_complex:
        return False
    return torch.promote_types(wide, narrow) == wide


def _reshape(node: fx.Node) -> fx.Node | None:
    root = _source(node)
    while operator_of(root) in RESHAPES:
        root = _source(root)
    if same_shape(shape_of(root), shape_of(node)):
        return root
    sizes = reshape_sizes(shape_of(node))
    if sizes is None or _is_plain(node, aten.reshape.default, (root, sizes)):
        return None
    return insert(node.graph, aten.reshape.default, (root, sizes), like=node.meta["val"])


def _permute(node: fx.Node) -> fx.Node | None:
    source, rank = _source(node), rank_of(node)
    if operator_of(node) == "permute":
        dims = [at(dim, rank) for dim in argument(node, "dims")]
    elif operator_of(node) == "t":
        dims = list(range(rank))[::-1]
    else:
        dims = list(range(rank))
        a, b = at(argument(node, "dim0"), rank), at(argument(node, "dim1"), rank)
        dims[a], dims[b] = b, a
    if _is_plain(node, aten.permute.default, (source, dims)) and operator_of(source) != "permute":
        shape = shape_of(source)
        moved = [dim for dim in dims if not is_one(shape[dim])]
        if moved != sorted(moved) or reshape_sizes(shape) is None:
            return None
    return permuted(source, dims)


def _slice(node: fx.Node) -> fx.Node | None:
    source = _source(node)
    if operator_of(node) == "narrow":
        start, step = argument(node, "start"), 1
        end = start + argument(node, "length") if isinstance(start, int) else None
        if end is None or not isinstance(end, int):
            return None
    else:
        start, end, step = (argument(node, key) for key in ("start", "end", "step"))
    dim = at(argument(node, "dim"), rank_of(source))
    if same_shape(shape_of(source), shape_of(node)) and step == 1:
        return source
    size = shape_of(source)[dim]
    start = 0 if start is None else start
    if not (isinstance(size, int) and isinstance(start, int) and isinstance(end, int | None)):
        return None
    start = min(at(start, size), size)
    stop = size if end is None else min(at(end, size), size)
    return _sliced(node, source, dim, start, stop, step)


def _sliced(node: fx.Node, source: fx.Node, dim: int, start: int, stop: int, step: int) -> fx.Node | None:
    """A slice with plain bounds, of the tensor that `source` is itself a slice of.

    A source with more users stays between: it is a value of its own, such as the queries of packed heads.
    """
    is_slice = operator_of(source) == "slice" and len(source.args) == 4 and source.args[1] == dim
    if is_slice and len(source.users) == 1:
        offset = source.args[2]
        assert isinstance(offset, int)
        source, start, stop = _source(source), start + offset, stop + offset
    args = (source, dim, start, stop) if step == 1 else (source, dim, start, stop, step)
    if _is_plain(node, aten.slice.Tensor, args):
        return None
    return insert(node.graph, aten.slice.Tensor, args, like=node.meta["val"])


def _part(node: fx.Node) -> fx.Node | None:
    """One part of a split: a slice, or a select where unbind removed the dimension."""
    many, index = node.args
    if not (isinstance(many, fx.Node) and isinstance(index, int) and is_tensor(_first_input(many))):
        return None
    kind, source = operator_of(many), _first_input(many)
    if kind not in ("split", "split_with_sizes", "chunk", "unbind") or source is None:
        return None
    dim = at(argument(many, "dim"), rank_of(source))
    parts = many.meta["val"]
    index = at(index, len(parts))
    if kind == "unbind":
        return insert(node.graph, aten.select.int, (source, dim, index), like=node.meta["val"])
    widths = [part.shape[dim] for part in parts[: index + 1]]
    if not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[:-1])
    return _sliced(node, source, dim, start, start + widths[-1], 1)


def _first_input(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None


def _without_leading_ones(node: fx.Node) -> fx.Node | None:
    """An operator along the last dimension, before rather than behind a reshape that puts a 1 in front."""
    view = node.args[0]
    if operator_of(view) != "reshape" or not is_tensor(view) or not is_one(shape_of(view)[0]):
        return None
    source = _source(view)
    shape, before = shape_of(view), shape_of(source)
    sizes = reshape_sizes(shape_of(node))
    if sizes is None or not same_shape(shape[-1:], before[-1:]):
        return None
    if rank_of(source) >= rank_of(view) or not same_shape(counted(shape), counted(before)):
        return None
    earlier = node.graph.node_copy(node, lambda operand: source if operand is view else operand)
    earlier.meta["val"] = node.meta["val"].new_empty((*before[:-1], shape_of(node)[-1]))
    return insert(node.graph, aten.reshape.default, (earlier, sizes), like=node.meta["val"])


def _expand(node: fx.Node) -> fx.Node | None:
    source = _source(node)
    return source if same_shape(shape_of(source), shape_of(node)) else None


def _neutral(node: fx.Node) -> fx.Node | None:
    """`x * 1`, `x / 1`, `x + 0`, `x - 0` in x's own dtype."""
    source, number = node.args[0], node.args[1] if len(node.args) > 1 else None
    neutral = 1 if operator_of(node) in ("mul", "div") else 0
    if not isinstance(source, fx.Node) or not isinstance(number, int | float) or number != neutral:
        return None
    if not is_tensor(source) or node.kwargs.get("rounding_mode") is not None:
        return None
    same = dtype_of(source) == dtype_of(node) and same_shape(shape_of(source), shape_of(node))
    return source if same else None


def _cat(node: fx.Node) -> fx.Node | None:
    tensors: list[fx.Node] = argument(node, "tensors")
    return tensors[0] if len(tensors) == 1 else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _neutral),
    **dict.fromkeys(("transpose", "permute", "t"), _permute),
    **dict.fromkeys(("slice", "narrow"), _slice),
    "cat": _cat,
    "expand": _expand,
    "getitem": _part,
}
