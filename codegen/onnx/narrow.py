"""Which nodes are computed for the wanted rows alone: what follows the last attention and works on rows.
Knows which operators do; decides from the graph alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...ir.program import Program

_BY_ROWS = (
    "llmc.linear", "llmc.quantized_linear", "llmc.rms_norm", "llmc.layer_norm", "llmc.add_rms_norm",
    "llmc.add_layer_norm", "llmc.gated_activation", "llmc.gated_activation_packed", "aten.add", "aten.mul",
    "aten.silu", "aten.gelu", "aten.relu", "aten.tanh",
)  # fmt: skip


def narrow_nodes(program: Program) -> frozenset[fx.Node]:
    """The nodes whose rows nobody reads but a gather of the wanted ones, and whose operands are matrices of
    as many rows, or weights."""
    ids = next(node for node in program.graph.nodes if node.target == "input_ids")
    tokens = ids.meta["val"].shape[0].node.expr
    found: set[fx.Node] = set()

    def has_rows(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(has_rows, value))
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            return False
        rows: Any = value.shape[0]
        return isinstance(rows, torch.SymInt) and rows.node.expr == tokens

    for node in reversed(program.graph.nodes):
        if node.op != "call_function" or not _works_on_rows(node) or not node.users:
            continue
        operands = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if all(has_rows(each.meta["val"]) for each in (node, *operands)) and all(
            user in found or _gathers(user, result) for result in _results(node) for user in result.users
        ):
            found.update(_results(node), (node,))
    return frozenset(found)


def _works_on_rows(node: fx.Node) -> bool:
    return str(node.target).rpartition(".")[0] in _BY_ROWS


def _results(node: fx.Node) -> list[fx.Node]:
    """What others read of `node`: itself, or the values that it is taken apart into."""
    is_pair = isinstance(node.meta["val"], tuple)
    return [user for user in node.users if user.target is operator.getitem] if is_pair else [node]


def _gathers(user: fx.Node, source: fx.Node) -> bool:
    is_gather = str(user.target) == "llmc.gather_rows.default" and user.args[0] is source
    rows = user.args[1] if is_gather else None
    return isinstance(rows, fx.Node) and rows.target == "out_rows"
