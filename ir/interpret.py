"""Run a Program at any stage with the reference operators. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

Observer = Callable[[fx.Node, Any], None]


def interpret(
    graph: fx.Graph,
    inputs: Mapping[str, Tensor],
    weight: Callable[[str], Tensor],
    observe: Observer | None = None,
) -> Any:
    """Evaluate `graph` on `inputs` (by placeholder name), fetching weights by name from `weight`.

    Values are dropped after their last use. `observe(node, value)` sees every computed value.
    """
    dying = last_uses(graph)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            values[node] = _value(node, inputs, weight, values)
            if observe is not None:
                observe(node, values[node])
            for dead in dying.get(node, ()):
                del values[dead]
    raise ValueError("the graph has no output")


def _value(
    node: fx.Node,
    inputs: Mapping[str, Tensor],
    weight: Callable[[str], Tensor],
    values: dict[fx.Node, Any],
) -> Any:
    if node.op == "placeholder":
        return inputs[str(node.target)]
    if node.op == "get_attr":
        return weight(str(node.target))
    assert callable(node.target)
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values nobody needs after it ran."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        if user.op != "output":
            dying.setdefault(user, []).append(node)
    return dying
