"""Which nodes of a graph need computing for the wanted rows alone: what follows the last attention and works
on rows. Knows graphs; which operators work on rows its callers say."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def wanted_alone(
    graph: fx.Graph, works_on_rows: Callable[[fx.Node], bool]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The nodes whose rows nobody reads but a gather of the wanted ones (`out_rows`), in order, each with
    what it reads of all rows: matrices of floats, or wider.

    `works_on_rows` says of an operator call that it computes each row of its results `[T, ...]` from the same
    row of those operands that have T of them.
    """
    ids = next(node for node in graph.nodes if node.target == "input_ids")
    tokens = ids.meta["val"].shape[0].node.expr
    blocked: set[fx.Node] = set()
    while True:
        found = _found(graph, tokens, works_on_rows, blocked)
        whole = {
            node: tuple(
                source
                for source in node.all_input_nodes
                if source not in found and _has_rows(source.meta["val"], tokens)
            )
            for node in graph.nodes
            if node in found
        }
        stuck = {node for node, sources in whole.items() if not all(map(_can_gather, sources))}
        if not stuck:
            return whole
        blocked |= stuck


def _found(
    graph: fx.Graph, tokens: Any, works_on_rows: Callable[[fx.Node], bool], blocked: set[fx.Node]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not node.users or node in blocked or not works_on_rows(node):
            continue
        results = _results(node)
        if all(_fits(source.meta["val"], tokens) for source in node.all_input_nodes) and all(
            _has_rows(result.meta["val"], tokens)
            and all(user in found or _gathers(user, result) for user in result.users)
            for result in results
        ):
            found.update(results, (node,))
    return found


def _has_rows(value: Any, tokens: Any) -> bool:
    """Whether a value is a tensor `[T, ...]`, or several."""
    if isinstance(value, tuple | list):
        return all(_has_rows(one, tokens) for one in value)  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, torch.Tensor) and value.dim() > 0 and _is_tokens(value.shape[0], tokens)


def _fits(value: Any, tokens: Any) -> bool:
    """Whether an operand has T rows, or is a tensor of known sizes."""
    return _has_rows(value, tokens) or (
        isinstance(value, torch.Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)
    )


def _is_tokens(size: Any, tokens: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == tokens)


def _can_gather(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.is_floating_point()


def _results(node: fx.Node) -> list[fx.Node]:
    """What others read of `node`: itself, or the values that it is taken apart into."""
    is_several = isinstance(node.meta["val"], tuple | list)
    return [user for user in node.users if user.target is operator.getitem] if is_several else [node]


def _gathers(user: fx.Node, source: fx.Node) -> bool:
    is_gather = str(user.target) == "llmc.gather_rows.default" and user.args[0] is source
    rows = user.args[1] if is_gather else None
    return isinstance(rows, fx.Node) and rows.target == "out_rows"
