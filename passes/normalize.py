"""Say in `llmc::` operators what ATen says in several spellings.

    aten.linear(x, w, b)  ·  aten.addmm(b, x, w)        →    llmc.linear(x, w or its transpose, b)
    aten.embedding(w, ids)                              →    llmc.embedding(ids, w)
    aten.index(h, [out_rows])                           →    llmc.gather_rows(h, out_rows)
    aten.layer_norm(x, [D], w, b, eps)                  →    llmc.layer_norm(x, w, b, eps, …)
    mul(tanh(div(x, c)), c)                             →    llmc.softcap(x, c)

Rows are gathered as early as the model allows: not logits but the hidden states that they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..ir.program import Program
from ..ir.weights import Expr, WeightStore
from .base import CANONICAL, Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .fold_rules import transposed
from .gather_early import gather_early
from .graph import argument, erase_dead, is_call, is_weight, read_weight, weight_nodes
from .rewrite import dtype_of, insert, is_tensor, llmc, operator_of, rank_of, same_shape, shape_of
from .simplify import SIMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalize:
    """Linears, embeddings, soft caps and row gathers as `llmc::` operators."""

    name: ClassVar[str] = "normalize"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    provides: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    contract: ClassVar[Contract] = Within(1e-5)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite in one walk; misses name matrix products and look-ups that stay as they are."""
        graph = program.copy_graph()
        walk = _Walk(graph, program.weights)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                walk.visit(node)
        erase_dead(graph)
        walk.num_matches += gather_early(graph)
        misses = [f"{reason} ({count} times)" for reason, count in sorted(walk.misses.items())]
        report = PassReport(matches=walk.num_matches, misses=tuple(misses))
        weights = program.weights.with_entries(walk.added)
        return PassResult(program=program.replace(graph=graph, weights=weights), report=report)


class _Walk:
    """One walk over a graph, with the transposed weights that it makes on the way."""

    def __init__(self, graph: fx.Graph, weights: WeightStore) -> None:
        self.added: dict[str, Expr] = {}
        self.misses: Counter[str] = Counter()
        self.num_matches = 0
        self._graph = graph
        self._weights = weights
        self._readers = weight_nodes(graph)
        self._rules: dict[str, Callable[[fx.Node], fx.Node | None]] = {
            "add": self._bias,
            "addmm": self._addmm,
            "embedding": self._embedding,
            "index": self._index,
            "index_select": self._index_select,
            "layer_norm": _layer_norm,
            "linear": self._linear,
            "matmul": self._matmul,
            "mm": self._matmul,
            "mul": _softcap,
        }

    def visit(self, node: fx.Node) -> None:
        """Rewrite `node` if a rule for its operator applies."""
        rule = self._rules.get(operator_of(node))
        if rule is None:
            return
        with self._graph.inserting_before(node):
            better = rule(node)
        if better is None:
            return
        better.meta.setdefault("val", node.meta["val"])
        node.replace_all_uses_with(better)
        self._graph.erase_node(node)
        self.num_matches += 1

    def _linear(self, node: fx.Node) -> fx.Node | None:
        x, weight, bias = argument(node, "input"), argument(node, "weight"), argument(node, "bias")
        if not is_weight(weight):
            self.misses["aten.linear by a computed matrix"] += 1
            return None
        return insert(self._graph, llmc.linear.default, (x, weight, bias))

    def _addmm(self, node: fx.Node) -> fx.Node | None:
        bias, x, matrix = (argument(node, key) for key in ("self", "mat1", "mat2"))
        plain = argument(node, "beta") == 1 and argument(node, "alpha") == 1
        if not (plain and is_weight(bias) and is_weight(matrix) and rank_of(bias) == 1):
            self.misses["aten.addmm that is not a weight and a bias"] += 1
            return None
        return insert(self._graph, llmc.linear.default, (x, self._transposed(matrix), bias))

    def _matmul(self, node: fx.Node) -> fx.Node | None:
        x, matrix = node.args[0], node.args[1]
        known = is_weight(matrix) and not is_weight(x) and is_tensor(x)
        if not known or not is_tensor(matrix) or rank_of(matrix) != 2:
            self.misses[f"aten.{operator_of(node)} by a computed matrix"] += 1
            return None
        return insert(self._graph, llmc.linear.default, (x, self._transposed(matrix), None))

    def _transposed(self, matrix: fx.Node) -> fx.Node:
        """The reader of the transpose of the weight that `matrix` reads."""
        source = str(matrix.target)
        expr = transposed(self._weights[source], (1, 0))
        name = next((key for key in self._weights if self._weights[key] is expr), f"{source}.transposed")
        if name not in self._readers:
            self.added[name] = expr
            with self._graph.inserting_after(matrix):
                reader = read_weight(self._graph, name)
            reader.meta["val"] = matrix.meta["val"].t()
            self._readers[name] = reader
        return self._readers[name]

    def _bias(self, node: fx.Node) -> fx.Node | None:
        """A bias added right after the product."""
        product, bias = node.args[0], node.args[1]
        if is_weight(product):
            product, bias = bias, product
        if not (is_call(product, llmc.linear.default) and is_weight(bias)) or node.kwargs:
            return None
        assert isinstance(product, fx.Node)
        assert isinstance(bias, fx.Node)
        fits = rank_of(bias) == 1 and dtype_of(bias) == dtype_of(product)
        if not fits or product.args[2] is not None or len(product.users) > 1:
            return None
        same_width = same_shape(shape_of(bias), shape_of(product)[-1:])
        return insert(self._graph, llmc.linear.default, (*product.args[:2], bias)) if same_width else None

    def _embedding(self, node: fx.Node) -> fx.Node | None:
        weight, ids = argument(node, "weight"), argument(node, "indices")
        if not is_weight(weight):
            self.misses["aten.embedding of a computed table"] += 1
            return None
        return insert(self._graph, llmc.embedding.default, (ids, weight))

    def _index(self, node: fx.Node) -> fx.Node | None:
        x, indices = argument(node, "self"), argument(node, "indices")
        return self._gathered(x, indices[0]) if len(indices) == 1 else None

    def _index_select(self, node: fx.Node) -> fx.Node | None:
        x, dim, rows = (argument(node, key) for key in ("self", "dim", "index"))
        return self._gathered(x, rows) if dim == 0 else None

    def _gathered(self, x: fx.Node, rows: fx.Node) -> fx.Node | None:
        if rows.op != "placeholder":
            return None
        return insert(self._graph, llmc.gather_rows.default, (x, rows))


def _layer_norm(node: fx.Node) -> fx.Node | None:
    """Layer norm of the last dimension, its weight as stored or with 1 added to it."""
    x, weight, bias = (argument(node, key) for key in ("input", "weight", "bias"))
    offset = 0.0
    if operator_of(weight) == "add" and weight.args[1] == 1:
        weight, offset = weight.args[0], 1.0
    if len(argument(node, "normalized_shape")) > 1 or not all(
        part is None or is_weight(part) for part in (weight, bias)
    ):
        return None
    args = (x, weight, bias, argument(node, "eps"), offset, "scale_then_cast")
    return insert(node.graph, llmc.layer_norm.default, args)


def _softcap(node: fx.Node) -> fx.Node | None:
    bounded, cap = node.args[0], node.args[1]
    if operator_of(bounded) != "tanh" or not isinstance(cap, int | float):
        return None
    assert isinstance(bounded, fx.Node)
    scaled = bounded.args[0]
    if operator_of(scaled) not in ("div", "mul") or len(bounded.users) > 1:
        return None
    assert isinstance(scaled, fx.Node)
    x, number = scaled.args[0], scaled.args[1]
    if not isinstance(number, int | float) or "rounding_mode" in scaled.kwargs:
        return None
    inverse = number if operator_of(scaled) == "div" else 1 / number
    if abs(inverse - cap) > 1e-9 * abs(cap):
        return None
    return insert(node.graph, llmc.softcap.default, (x, float(cap)))
