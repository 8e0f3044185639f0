"""Compute at compile time what depends on weights and constants alone.

    t = aten.t(w)                          w.t: weight, the transpose of w, as a lazy expression
    y = aten.matmul(x, t)             →    y = aten.matmul(x, w.t)
    f = aten.pow(10000.0, arange)          f: weight, a small tensor computed now

Rearrangements of weights (transpose, slice, cast, join) stay lazy whatever their size; arithmetic is done
now where values are known and small, so that no big weight is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..ir.program import Program
from ..ir.weights import Constant, Expr, Unbound, WeightStore
from .base import TRACED, Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option, option
from .fold_rules import SPLITS, lazy_expression
from .graph import erase_dead, is_weight, read_weight, weight_nodes
from .rewrite import aten, is_tensor, operator_of, replace

_CREATORS = frozenset({"arange", "full", "ones", "zeros", "empty", "scalar_tensor"})
_SCALAR_OPERATORS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldConstants:
    """Fold expressions over weights and constants."""

    name: ClassVar[str] = "fold_constants"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({TRACED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-6)

    expect: int = expect_option()
    limit_bytes: int = option(1 << 20, "Largest tensor that arithmetic is done on at compile time.", low=0)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fold in one walk; misses name arithmetic on weights that has to wait for run time."""
        graph = program.copy_graph()
        folder = _Folder(graph, program.weights, self.limit_bytes)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                folder.visit(node)
        erase_dead(graph)
        weights = program.weights.with_entries(folder.added)
        report = PassReport(matches=folder.matches, misses=tuple(folder.misses))
        return PassResult(program=program.replace(graph=graph, weights=weights), report=report)


class _Folder:
    """One walk over a graph with the weights that it makes on the way."""

    def __init__(self, graph: fx.Graph, weights: WeightStore, limit_bytes: int) -> None:
        self.added: dict[str, Expr] = {}
        self.matches = 0
        self.misses: list[str] = []
        self._graph = graph
        self._weights = weights
        self._limit_bytes = limit_bytes
        self._readers = weight_nodes(graph)
        self._names: dict[Expr, str] = {weights[name]: name for name in weights}

    def visit(self, node: fx.Node) -> None:
        """Fold `node` when all it reads is known."""
        if self._scalar_operand(node) or not is_tensor(node):
            return
        sources = node.all_input_nodes
        if not all(is_weight(source) or _is_parts(source) for source in sources):
            return
        if not sources and operator_of(node) not in _CREATORS:
            return
        expr = lazy_expression(node, self._expr) if sources else None
        if expr is None:
            expr = self._computed(node)
        if expr is not None:
            self._put(node, expr)

    def _expr(self, node: fx.Node) -> Expr:
        name = str(node.target)
        return self.added[name] if name in self.added else self._weights[name]

    def _scalar_operand(self, node: fx.Node) -> bool:
        """`x * w` with a constant `w` of no dimensions: a number does not take part in type promotion,
        and neither does such a tensor."""
        if node.target not in _SCALAR_OPERATORS or not is_tensor(node.args[0]) or not is_weight(node.args[1]):
            return False
        source, number = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(number, fx.Node)
        expr = self._expr(number)
        kinds = (source.meta["val"].is_floating_point(), expr.dtype.is_floating_point)
        if expr.shape or not isinstance(expr, Constant) or is_weight(source) or kinds != (True, True):
            return False
        node.update_arg(1, float(expr.value))
        self.matches += 1
        return True

    def _computed(self, node: fx.Node) -> Expr | None:
        """The value of `node` as a constant, when it is small and everything it reads is known."""
        value: Any = node.meta["val"]
        exprs = [self._expr(source) for source in node.all_input_nodes if is_weight(source)]
        if len(exprs) != len(node.all_input_nodes) or not all(isinstance(dim, int) for dim in value.shape):
            return None
        sizes = [value.numel() * value.element_size(), *(_num_bytes(expr) for expr in exprs)]
        if max(sizes) > self._limit_bytes:
            self.misses.append(f"{node.name}: larger than limit_bytes ({max(sizes)} bytes)")
            return None
        if any(_has_unbound(expr) for expr in exprs):
            self.misses.append(f"{node.name}: computed from weights that are not bound yet")
            return None
        reader = self._weights.reader
        known = dict(zip(node.all_input_nodes, (expr.evaluate(reader) for expr in exprs), strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        return Constant(result.detach().clone(memory_format=torch.contiguous_format))

    def _put(self, node: fx.Node, expr: Expr) -> None:
        name = self._names.get(expr)
        if name is None:
            name = self._fresh(node)
            self.added[name], self._names[expr] = expr, name
        self._read(node, name)

    def _read(self, node: fx.Node, name: str) -> None:
        if name not in self._readers:
            with self._graph.inserting_before(next(iter(self._graph.nodes))):
                self._readers[name] = read_weight(self._graph, name)
            self._readers[name].meta["val"] = node.meta["val"]
        replace(node, self._readers[name])
        self.matches += 1

    def _fresh(self, node: fx.Node) -> str:
        base = next((str(source.target) for source in node.all_input_nodes if is_weight(source)), "folded")
        wanted = f"{base}.{operator_of(node).removeprefix('_')}"
        name, count = wanted, 1
        while name in self._weights or name in self.added:
            name, count = f"{wanted}_{count}", count + 1
        return name


def _is_parts(node: fx.Node) -> bool:
    """Whether `node` is a weight cut into several, which only its parts make a tensor again."""
    return operator_of(node) in SPLITS and is_weight(node.args[0])


def _num_bytes(expr: Expr) -> int:
    count = expr.dtype.itemsize
    for size in expr.shape:
        count *= size
    return count


def _has_unbound(expr: Any) -> bool:
    if isinstance(expr, Unbound):
        return True
    if isinstance(expr, tuple):
        return any(_has_unbound(part) for part in expr)
    if not is_dataclass(expr) or isinstance(expr, Constant):
        return False
    return any(_has_unbound(getattr(expr, entry.name)) for entry in fields(expr))
