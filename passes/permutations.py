"""Cancel permutations against others further up, through whatever lies between.

    q = permute(v, [1, 0, 2]); c = mul(q, cos[1, T, D]); p = permute(c, [1, 0, 2])
    → p = mul(v, reshape(cos, [T, 1, D]))

A permute goes when everything above it can be computed in the permuted layout at no extra cost: down to
permutes that cancel, and to operands whose permutation is a mere reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from .graph import argument, calls
from .rewrite import (
    LAST_DIM,
    Dim,
    argument_names,
    at,
    aten,
    insert,
    is_elementwise,
    is_one,
    is_tensor,
    operator_of,
    rank_of,
    reshape_sizes,
    same_dim,
    shape_of,
)

Order = tuple[int, ...]
Want = tuple[fx.Node, Order]

_DEPTH = 48
_FREE = frozenset({"reshape", "slice", "select", "expand", "permute"})


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to compute a node in another order: its operands in theirs, then `make` on the new operands."""

    operands: tuple[Want, ...]
    make: Callable[[dict[fx.Node, fx.Node]], fx.Node]


def eliminate_permutes(graph: fx.Graph) -> tuple[int, list[str]]:
    """Cancel what can be in place; gives how many permutes went, and a reason for each that stays."""
    layouts = _Layouts(graph)
    gone, misses = 0, list[str]()
    for node in calls(graph, aten.permute.default):
        if not node.users:
            continue
        reason = layouts.obstacle(node)
        if reason is not None:
            misses.append(f"{node.name}: {reason}")
            continue
        with graph.inserting_before(node):
            better = layouts.build((_source(node), _order(node)))
        node.replace_all_uses_with(better)
        gone += 1
    return gone, misses


class _Layouts:
    """Plans for nodes in other orders, each made and built at most once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._plans: dict[Want, _Plan | str] = {}
        self._built: dict[Want, fx.Node] = {}

    def obstacle(self, permute: fx.Node) -> str | None:
        """Why `permute` must stay; None when it can go."""
        root = (_source(permute), _order(permute))
        visited: set[Want] = set()
        reason = self._visit(root, visited, 0)
        if reason is not None:
            return reason
        inside = {node for node, _ in visited} | {permute}
        for node, _ in visited:
            if operator_of(node) in _FREE or not isinstance(self._plans[node, _], _Plan):
                continue
            if self._is_leaf((node, _)):
                continue
            stranger = next((user for user in node.users if user not in inside), None)
            if stranger is not None and not _same_permute(stranger, permute):
                return f"{node.name} would be computed twice, since {stranger.name} reads it too"
        return None

    def build(self, want: Want) -> fx.Node:
        """The node that computes `want`, inserted at the graph's insertion point."""
        if want not in self._built:
            node, order = want
            if list(order) == sorted(order):
                return node
            plan = self._plans[want]
            assert isinstance(plan, _Plan)
            made = plan.make({operand: self.build((operand, turn)) for operand, turn in plan.operands})
            if "val" not in made.meta:
                made.meta["val"] = node.meta["val"].permute(order)
            self._built[want] = made
        return self._built[want]

    def _is_leaf(self, want: Want) -> bool:
        plan = self._plans[want]
        return isinstance(plan, _Plan) and not plan.operands

    def _visit(self, want: Want, visited: set[Want], depth: int) -> str | None:
        node, order = want
        if list(order) == sorted(order) or want in visited:
            return None
        if depth > _DEPTH:
            return f"the way up from {node.name} is too long"
        if want not in self._plans:
            self._plans[want] = _plan(self._graph, node, order)
        plan = self._plans[want]
        if isinstance(plan, str):
            return plan
        visited.add(want)
        for operand in plan.operands:
            reason = self._visit(operand, visited, depth + 1)
            if reason is not None:
                return reason
        return None


def _plan(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | str:
    """A plan for `node` in `order`, or the reason why there is none."""
    shape = shape_of(node)
    moved = [dim for dim in order if not is_one(shape[dim])]
    sizes = reshape_sizes([shape[dim] for dim in order])
    if moved == sorted(moved) and sizes is not None:
        return _Plan((), lambda _: insert(graph, aten.reshape.default, (node, sizes)))
    name = operator_of(node)
    rule = _elementwise if is_elementwise(node) else _last_dim if name in LAST_DIM else _RULES.get(name)
    plan = rule(graph, node, order) if rule is not None else None
    return plan or f"{node.name} ({name or node.op}) is computed in one order only"


def _again(graph: fx.Graph, node: fx.Node, changes: dict[str, Any]) -> Callable[..., fx.Node]:
    """Make the same call on new operands, with some arguments changed."""

    def make(new: dict[fx.Node, fx.Node]) -> fx.Node:
        assert isinstance(node.target, OpOverload)
        names = argument_names(node.target)
        args = [changes.get(name, arg) for name, arg in zip(names, node.args, strict=False)]
        kwargs = {key: changes.get(key, arg) for key, arg in node.kwargs.items()}
        for key, value in changes.items():
            if names.index(key) >= len(args):
                kwargs[key] = value
        args, kwargs = fx.map_arg((tuple(args), kwargs), lambda source: new.get(source, source))
        return insert(graph, node.target, args, **kwargs)

    return make


def _elementwise(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    """Operands of full rank are wanted in the same order; of lower rank, as a reshape or not at all."""
    wants: list[Want] = []
    padded: dict[fx.Node, list[int]] = {}
    for source in node.all_input_nodes:
        missing = len(order) - rank_of(source) if is_tensor(source) else None
        if missing is None:
            return None
        if missing == 0:
            wants.append((source, order))
        elif order[missing:] != tuple(range(missing, len(order))):
            sizes = _padded_sizes(shape_of(source), order, missing)
            if sizes is None:
                return None
            padded[source] = sizes
    make = _again(graph, node, {})

    def with_padding(new: dict[fx.Node, fx.Node]) -> fx.Node:
        made = {
            source: insert(graph, aten.reshape.default, (source, sizes)) for source, sizes in padded.items()
        }
        for source, reshaped in made.items():
            reshaped.meta["val"] = source.meta["val"].reshape(padded[source])
        return make({**new, **made})

    return _Plan(tuple(wants), with_padding)


def _padded_sizes(shape: tuple[Dim, ...], order: Order, missing: int) -> list[int] | None:
    full = (1,) * missing + shape
    moved = [dim for dim in order if not is_one(full[dim])]
    return reshape_sizes([full[dim] for dim in order]) if moved == sorted(moved) else None


def _last_dim(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    source = _source(node)
    if order[-1] != len(order) - 1 or rank_of(source) != len(order):
        return None
    return _Plan(((source, order),), _again(graph, node, {}))


def _along_dim(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    """Operators along one named dimension that keep the rank: it is found elsewhere after permuting."""
    dim = argument(node, "dim")
    if not isinstance(dim, int) or not is_tensor(node):
        return None
    sources = node.all_input_nodes
    if any(not is_tensor(source) or rank_of(source) != len(order) for source in sources):
        return None
    place = order.index(at(dim, len(order)))
    return _Plan(tuple((source, order) for source in sources), _again(graph, node, {"dim": place}))


def _stack(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    dim = at(argument(node, "dim"), len(order))
    inner = tuple(axis - (axis > dim) for axis in order if axis != dim)
    make = _again(graph, node, {"dim": order.index(dim)})
    return _Plan(tuple((source, inner) for source in node.all_input_nodes), make)


def _select(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    """The dimension that goes is put first, so that it is selected there."""
    dim = at(argument(node, "dim"), len(order) + 1)
    outer = (dim, *(axis + (axis >= dim) for axis in order))
    return _Plan(((_source(node), outer),), _again(graph, node, {"dim": 0}))


def _expand(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    source, sizes = _source(node), argument(node, "size")
    again = _again(graph, node, {"size": [sizes[dim] for dim in order]})
    missing = len(order) - rank_of(source)
    if not missing:
        return _Plan(((source, order),), again)
    padded = _padded_sizes(shape_of(source), order, missing)
    if padded is None:
        return None

    def make(_: dict[fx.Node, fx.Node]) -> fx.Node:
        whole = insert(graph, aten.reshape.default, (source, padded))
        whole.meta["val"] = source.meta["val"].reshape(padded)
        return again({source: whole})

    return _Plan((), make)


def _reshape(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    """A reshape that leaves alone all the leading dimensions that are permuted."""
    source = _source(node)
    touched = max(index for index, dim in enumerate(order) if index != dim) + 1
    before, after = shape_of(source), shape_of(node)
    if len(before) < touched or not all(same_dim(before[i], after[i]) for i in range(touched)):
        return None
    sizes = reshape_sizes([after[dim] for dim in order])
    if sizes is None:
        return None
    inner = (*order[:touched], *range(touched, len(before)))
    return _Plan(((source, inner),), _again(graph, node, {"shape": sizes}))


def _permute(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    own = _order(node)
    want = (_source(node), tuple(own[dim] for dim in order))
    return _Plan((want,), lambda new: new[want[0]])


def _as_complex(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    return _Plan(((_source(node), (*order, len(order))),), _again(graph, node, {}))


def _as_real(graph: fx.Graph, node: fx.Node, order: Order) -> _Plan | None:
    if order[-1] != len(order) - 1:
        return None
    return _Plan(((_source(node), order[:-1]),), _again(graph, node, {}))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _order(permute: fx.Node) -> Order:
    dims: list[int] = argument(permute, "dims")
    return tuple(at(dim, len(dims)) for dim in dims)


def _same_permute(user: fx.Node, permute: fx.Node) -> bool:
    return operator_of(user) == "permute" and _order(user) == _order(permute)


_RULES: dict[str, Callable[[fx.Graph, fx.Node, Order], _Plan | None]] = {
    **dict.fromkeys(("cat", "slice", "_softmax", "softmax", "repeat_interleave", "cumsum"), _along_dim),
    "expand": _expand,
    "permute": _permute,
    "reshape": _reshape,
    "select": _select,
    "stack": _stack,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
}
