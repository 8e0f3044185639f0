"""Drop the batch dimension of 1 that a Hugging Face model carries around the packed tokens.

    x: f32[1, T, 64] = aten.unsqueeze(e, 0)          e: f32[T, 64]
    h: f32[1, T, 96] = aten.linear(x, w)        →    h: f32[T, 96] = aten.linear(e, w)
    y: f32[T, 96] = aten.select(h, 0, 0)             (users of y read h)

Every operator with a rule is called on operands without the dimension; an operator without a rule gets
it back by an `unsqueeze` at its border, so an unknown operator costs a view and never correctness.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from ..ir.program import Program
from .base import TRACED, Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .batch_rules import Call, Operands, Outcome, Same, rule_of
from .graph import argument, erase_dead
from .rewrite import aten, is_one, is_tensor, operator_of, rank_of, shape_of

UNBATCHED = "unbatched"


@dataclass(frozen=True, slots=True, kw_only=True)
class DropBatch:
    """Drop the leading dimension of 1."""

    name: ClassVar[str] = "drop_batch"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({TRACED})
    provides: ClassVar[frozenset[str]] = frozenset({UNBATCHED})
    contract: ClassVar[Contract] = Within(1e-6)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rebuild the graph without the dimension; misses name operators that needed it back."""
        walk = _Walk()
        for node in program.graph.nodes:
            walk.visit(node)
        erase_dead(walk.graph)
        misses = tuple(
            f"{name}: no rule for a lowered operand; the dimension was put back for {count} calls"
            for name, count in sorted(walk.unruled.items())
        )
        report = PassReport(matches=walk.num_lowered, misses=misses)
        return PassResult(program=program.replace(graph=walk.graph), report=report)


class _Walk:
    """One copy of a graph, node by node, each in its lowered form where it has one."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.num_lowered = 0
        self.unruled: Counter[str] = Counter()
        self._lowered: dict[fx.Node, fx.Node] = {}
        self._dropped: dict[fx.Node, bool] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        self._operands = Operands(self._lowered, self._dropped)

    def visit(self, node: fx.Node) -> None:
        """Copy `node`, lowered if it can be."""
        if node.op == "output":
            self.graph.output(fx.map_arg(node.args[0], self._whole))
            return
        outcome = self._seed(node)
        if outcome is None and self._operands.any_dropped(node):
            rule = rule_of(node)
            outcome = rule(node, self._operands) if rule is not None else None
            if outcome is not None and outcome.dropped and not _droppable(node.meta["val"]):
                outcome = None
            if outcome is None:
                self.unruled[operator_of(node)] += 1
        if outcome is not None:
            self._lower(node, outcome)
        elif self._operands.any_dropped(node) and isinstance(node.meta["val"], Tensor):
            self._surround(node)
        else:
            self._keep(node)

    def _seed(self, node: fx.Node) -> Outcome:
        """Where the dimension comes from: unsqueeze, or a view that adds it in front."""
        if operator_of(node) not in ("unsqueeze", "view", "reshape"):
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node) or self._operands.is_dropped(source) or not is_tensor(source):
            return None
        if rank_of(source) == 0 or rank_of(node) < 2 or not is_one(shape_of(node)[0]):
            return None
        if operator_of(node) == "unsqueeze":
            added = argument(node, "dim") in (0, -rank_of(node))
            return Same(self._lowered[source], dropped=True) if added else None
        if is_one(shape_of(source)[0]):
            return None
        sizes = argument(node, "size" if operator_of(node) == "view" else "shape")[1:]
        return Call(node.target, (self._lowered[source], self._operands.new(sizes)))

    def _lower(self, node: fx.Node, outcome: Call | Same) -> None:
        self._dropped[node] = outcome.dropped
        self.num_lowered += outcome.dropped
        if isinstance(outcome, Same):
            self._lowered[node] = outcome.node
            return
        new = self.graph.create_node("call_function", outcome.target, outcome.args, outcome.kwargs, node.name)
        value = node.meta["val"]
        new.meta["val"] = _without_dim(value) if outcome.dropped else value
        self._lowered[node] = new

    def _keep(self, node: fx.Node) -> None:
        self._dropped[node] = False
        new = self.graph.node_copy(node, self._whole)
        self._lowered[node] = new

    def _surround(self, node: fx.Node) -> None:
        """Put the dimension back for this call alone, and leave it out again behind it."""
        self._keep(node)
        value = node.meta["val"]
        if not _droppable(value):
            return
        self._restored[node] = self._lowered[node]
        self._lowered[node] = self.graph.call_function(aten.squeeze.dim, (self._lowered[node], 0))
        self._lowered[node].meta["val"] = _without_dim(value)
        self._dropped[node] = True

    def _whole(self, node: fx.Node) -> fx.Node:
        """The new node in the original's shape."""
        if not self._dropped[node]:
            return self._lowered[node]
        if node not in self._restored:
            whole = self.graph.call_function(aten.unsqueeze.default, (self._lowered[node], 0))
            whole.meta["val"] = node.meta["val"]
            self._restored[node] = whole
        return self._restored[node]


def _droppable(value: Any) -> bool:
    """Whether dimension 0 of a value can be left out: it is 1, and something is left."""
    if isinstance(value, Tensor):
        return value.dim() > 1 and is_one(value.shape[0])
    return isinstance(value, list | tuple) and all(_droppable(item) for item in value)


def _without_dim(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.squeeze(0)
    return type(value)(_without_dim(item) for item in value)
