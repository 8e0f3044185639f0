"""Gated feed-forward activations as one operator.

    a = aten.silu(gate); h = aten.mul(a, up)              →    h = llmc.gated_activation(gate, up, "silu")
    gate = slice(y, 0:F); up = slice(y, F:2F)  (and so on) →   h = llmc.gated_activation_packed(y, "silu")

In either order of the product, for every activation that has a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..ir.program import Program
from .base import Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .graph import argument, erase_dead
from .rewrite import aten, dtype_of, insert, is_tensor, llmc, operator_of, rank_of, same_shape, shape_of
from .simplify import SIMPLE

_PLAIN = {"silu": "silu", "relu": "relu", "sigmoid": "sigmoid"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation:
    """`activation(gate) * up` as `llmc.gated_activation`."""

    name: ClassVar[str] = "gated_activation"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace every product of an activation with a tensor of its shape."""
        graph = program.copy_graph()
        matches, misses = 0, list[str]()
        for node in list(graph.nodes):
            if operator_of(node) != "mul" or not node.users:
                continue
            better = _gated(graph, node, misses)
            if better is not None:
                node.replace_all_uses_with(better)
                graph.erase_node(node)
                matches += 1
        erase_dead(graph)
        report = PassReport(matches=matches, misses=tuple(misses))
        return PassResult(program=program.replace(graph=graph), report=report)


def activation_name(node: fx.Node) -> str | None:
    """The name of the activation that `node` computes from its first operand; None for anything else."""
    if operator_of(node) == "gelu":
        return _GELU[argument(node, "approximate")]
    square = operator_of(node) == "square" or (operator_of(node) == "pow" and node.args[1] == 2)
    if square and operator_of(node.args[0]) == "relu":
        return "relu2"
    return _PLAIN.get(operator_of(node))


def _gated(graph: fx.Graph, node: fx.Node, misses: list[str]) -> fx.Node | None:
    for active, up in (node.args[:2], node.args[1::-1]):
        if not (isinstance(active, fx.Node) and isinstance(up, fx.Node) and is_tensor(up)):
            return None
        name = activation_name(active)
        if name is None:
            continue
        reason = _obstacle(active, up)
        if reason is not None:
            misses.append(f"{node.name}: {reason}")
            continue
        gate = _first(active) if name != "relu2" else _first(_first(active))
        with graph.inserting_before(node):
            return _call(graph, node, gate, up, name)
    return None


def _first(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _obstacle(active: fx.Node, up: fx.Node) -> str | None:
    if not same_shape(shape_of(active), shape_of(up)):
        return f"{active.name} and {up.name} have different shapes"
    if dtype_of(active) != dtype_of(up):
        return f"{active.name} and {up.name} have different dtypes"
    return f"{active.name} has other users" if len(active.users) > 1 else None


def _call(graph: fx.Graph, node: fx.Node, gate: fx.Node, up: fx.Node, name: str) -> fx.Node:
    packed = _packed(gate, up)
    if packed is not None:
        operator, args = llmc.gated_activation_packed.default, (packed, name)
    else:
        operator, args = llmc.gated_activation.default, (gate, up, name)
    return insert(graph, operator, args, like=node.meta["val"])


def _packed(gate: fx.Node, up: fx.Node) -> fx.Node | None:
    """The tensor of which `gate` is the first half and `up` the second, along the last dimension."""
    if not (gate.target is up.target is aten.slice.Tensor and gate.args[0] is up.args[0]):
        return None
    source = gate.args[0]
    assert isinstance(source, fx.Node)
    last, width = rank_of(source) - 1, shape_of(source)[-1]
    if not isinstance(width, int) or width % 2:
        return None
    halves = ((last, 0, width // 2), (last, width // 2, width))
    fits = gate.args[1:] == halves[0] and up.args[1:] == halves[1]
    return source if fits and len(gate.users) == len(up.users) == 1 else None
