"""Regions of a graph between one value and another: where they can be cut, and what they compute.

Tells data (values of tokens) from tables (functions of positions and constants alone), and evaluates a
region on values of the caller's choosing, in float32. Knows no pattern.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.weights import Constant, WeightStore
from .graph import positions_of
from .rewrite import operator_of

_LOW = frozenset({torch.bfloat16, torch.float16})


class Regions:
    """Questions about one graph, which must not change meanwhile."""

    def __init__(self, graph: fx.Graph, weights: WeightStore, terminals: frozenset[str]) -> None:
        """`terminals` are operators that no region reaches beyond."""
        self.order = positions_of(graph)
        self._weights = weights
        self._terminals = terminals
        self._tables: set[fx.Node] = set()
        for node in graph.nodes:
            if self._makes_table(node):
                self._tables.add(node)

    def _makes_table(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.target == "positions"
        if node.op == "get_attr" or operator_of(node) == "sym_size":
            return True
        return node.op == "call_function" and all(source in self._tables for source in node.all_input_nodes)

    def is_table(self, node: fx.Node) -> bool:
        """Whether a value depends on positions, sizes and constants alone."""
        return node in self._tables

    def is_terminal(self, node: fx.Node) -> bool:
        """Whether regions end at `node`."""
        return node.op == "placeholder" or operator_of(node) in self._terminals

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The operands of `node` that depend on tokens."""
        return [source for source in node.all_input_nodes if source not in self._tables]

    def cuts(self, root: fx.Node) -> list[fx.Node]:
        """The values above `root` that all of its data passes through, `root` first, up to a terminal.

        The last one is no terminal when data comes from several places above it.
        """
        found, heap, waiting = [root], [(-self.order[root], root.name)], {root.name: root}
        while heap:
            _, name = heapq.heappop(heap)
            node = waiting.pop(name)
            if self.is_terminal(node):
                break
            for source in self.data_inputs(node):
                if source.name not in waiting:
                    waiting[source.name] = source
                    heapq.heappush(heap, (-self.order[source], source.name))
            if len(waiting) == 1:
                found.append(next(iter(waiting.values())))
        return found

    def between(self, bottom: fx.Node, top: fx.Node) -> list[fx.Node]:
        """The data nodes that compute `bottom` from `top`, a cut above it, in graph order; `top` left out."""
        inside: set[fx.Node] = set()
        stack = [bottom]
        while stack:
            node = stack.pop()
            if node is not top and node not in inside:
                inside.add(node)
                stack.extend(self.data_inputs(node))
        return sorted(inside, key=self.order.__getitem__)

    def tables_above(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Everything of tables that `nodes` read, directly or not, in graph order."""
        found: set[fx.Node] = set()
        stack = [source for node in nodes for source in node.all_input_nodes if source in self._tables]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return sorted(found, key=self.order.__getitem__)

    def constant(self, node: fx.Node) -> Tensor | None:
        """The value of a constant, None for a weight that is not in memory."""
        expr = self._weights[str(node.target)] if node.op == "get_attr" else None
        return expr.value if isinstance(expr, Constant) else None

    def evaluate(self, nodes: list[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
        """The value of the last of `nodes`, computed in order in float32 where the program rounds lower.

        Values of nodes in `known` are taken from there; constants come from memory. Raises LookupError
        when a weight is needed that is not in memory.
        """
        values: dict[fx.Node, Any] = dict(known)
        with torch.no_grad():
            for node in nodes:
                if node not in values:
                    values[node] = self._value(node, values)
        return values[nodes[-1]]

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            value = self.constant(node)
            if value is None:
                raise LookupError(f"{node.target} has no value yet")
            return raised(value)
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        kwargs = {key: torch.float32 if arg in _LOW else arg for key, arg in kwargs.items()}
        return node.target(*args, **kwargs)


def raised(value: Tensor) -> Tensor:
    """A tensor of low precision as float32, any other as it is."""
    return value.float() if value.dtype in _LOW else value


def same_structure(nodes: list[fx.Node], top: fx.Node) -> Any:
    """A key that two regions of one graph share when they compute the same function of their tops."""
    local: dict[fx.Node, Any] = {top: "top"}
    key: list[Any] = [tuple(str(dim) for dim in top.meta["val"].shape), top.meta["val"].dtype]
    for index, node in enumerate(nodes):
        args = (*node.args, *(item for pair in sorted(node.kwargs.items()) for item in pair))
        key.append((str(node.target), _text(args, local)))
        local[node] = index
    return tuple(key)


def _text(arg: Any, local: dict[fx.Node, Any]) -> str:
    """An argument with nodes of the region by number and all others by name."""
    if isinstance(arg, fx.Node):
        return f"%{local.get(arg, arg.name)}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_text(item, local) for item in arg)}]"
    return repr(arg)
