"""Operators that only rearrange a weight, as lazy expressions over it. Reads no values."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import fx

from ..ir.weights import Cast, Concat, Expr, Permute, Reshape, Slice, Stack
from .graph import argument
from .rewrite import CASTS, COPIES, RESHAPES, at, dtype_of, operator_of, shape_of

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})

Lookup = Callable[[fx.Node], Expr]


def lazy_expression(node: fx.Node, lookup: Lookup) -> Expr | None:
    """`node` over the weights it reads (found by `lookup`), or None when it does more than rearrange."""
    name = operator_of(node)
    if name in ("cat", "stack"):
        return _joined(node, lookup)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "getitem":
        return _part(node, source, lookup)
    of = lookup(source)
    if name in COPIES:
        return of
    if name in CASTS:
        return of if dtype_of(node) == of.dtype else Cast(of, dtype_of(node))
    if name in RESHAPES:
        return reshaped(of, tuple(int(size) for size in shape_of(node)))
    if name in ("t", "transpose", "permute"):
        return transposed(of, _order(node))
    return _cut(node, of)


def reshaped(of: Expr, shape: tuple[int, ...]) -> Expr:
    """`of` in another shape, without a chain of reshapes."""
    while isinstance(of, Reshape):
        of = of.of
    return of if of.shape == shape else Reshape(of, shape)


def transposed(of: Expr, dims: tuple[int, ...]) -> Expr:
    """`of` with its dimensions in the order `dims`, without a chain of permutations."""
    if isinstance(of, Permute):
        of, dims = of.of, tuple(of.dims[dim] for dim in dims)
    return of if dims == tuple(range(len(dims))) else Permute(of, dims)


def _order(node: fx.Node) -> tuple[int, ...]:
    rank = len(shape_of(node))
    if operator_of(node) == "permute":
        return tuple(at(dim, rank) for dim in argument(node, "dims"))
    dims = list(range(rank))
    if operator_of(node) == "t":
        return tuple(reversed(dims))
    a, b = at(argument(node, "dim0"), rank), at(argument(node, "dim1"), rank)
    dims[a], dims[b] = b, a
    return tuple(dims)


def _joined(node: fx.Node, lookup: Lookup) -> Expr | None:
    parts = tuple(lookup(part) for part in argument(node, "tensors"))
    dim = at(argument(node, "dim"), len(shape_of(node)))
    if any(part.dtype != parts[0].dtype for part in parts):
        return None
    if operator_of(node) == "cat":
        return Concat(parts, dim)
    return Stack(parts) if dim == 0 else None


def _part(node: fx.Node, many: fx.Node, lookup: Lookup) -> Expr | None:
    source, index = many.args[0], node.args[1]
    if operator_of(many) not in SPLITS or not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    of = lookup(source)
    dim = at(argument(many, "dim"), len(of.shape))
    index = at(index, len(many.meta["val"]))
    if operator_of(many) == "unbind":
        return reshaped(Slice(of, dim, index, index + 1), tuple(int(size) for size in shape_of(node)))
    widths = [int(part.shape[dim]) for part in many.meta["val"][: index + 1]]
    return Slice(of, dim, sum(widths[:-1]), sum(widths))


def _cut(node: fx.Node, of: Expr) -> Expr | None:
    """slice, narrow and select: one range of one dimension."""
    name, shape = operator_of(node), tuple(int(size) for size in shape_of(node))
    if name not in ("slice", "narrow", "select") or prod(shape) == 0:
        return None
    dim = at(argument(node, "dim"), len(of.shape))
    start = argument(node, "index" if name == "select" else "start") or 0
    if not isinstance(start, int) or (name == "slice" and argument(node, "step") != 1):
        return None
    start = at(start, of.shape[dim])
    if name == "select":
        return reshaped(Slice(of, dim, start, start + 1), shape)
    return of if shape == of.shape else Slice(of, dim, start, start + shape[dim])
