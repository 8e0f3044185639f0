"""Small questions and edits that graph walks share. Knows operators by schema, not by meaning."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from ..ir.arguments import argument as argument  # passes take their graph helpers from here
from ..ir.arguments import argument_names
from ..ir.program import Program


def is_call(node: Any, operator: OpOverload) -> bool:
    """Whether `node` is a call of `operator`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator


def calls(graph: fx.Graph, *operators: OpOverload) -> list[fx.Node]:
    """All calls of any of `operators`, in order."""
    return [node for node in graph.nodes if any(is_call(node, operator) for operator in operators)]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace the positional argument `name` of an operator call."""
    node.update_arg(argument_names(node).index(name), value)


def is_weight(node: Any) -> bool:
    """Whether `node` reads a weight."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def weight_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The one reader of each weight, by weight name."""
    return {str(node.target): node for node in graph.nodes if node.op == "get_attr"}


def read_weight(graph: fx.Graph, name: str) -> fx.Node:
    """A new reader of weight `name` at the insertion point, its node named after it."""
    return graph.create_node("get_attr", name, name=name.replace(".", "_"))


def erase_dead(graph: fx.Graph) -> None:
    """Erase every node that nobody uses, inputs and calls that write a cache excepted."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_function" and mutates(node.target):
            continue
        graph.erase_node(node)


def mutates(target: Any) -> bool:
    """Whether a call target writes to one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def fresh_name(program: Program, wanted: str) -> str:
    """`wanted`, or it with a number appended when the program already has a weight of that name."""
    name, count = wanted, 1
    while name in program.weights:
        name, count = f"{wanted}_{count}", count + 1
    return name


def positions_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """The index of each node in its graph, for questions of order."""
    return {node: index for index, node in enumerate(graph.nodes)}
