"""Move the gather of wanted rows from the logits up to the hidden states that they come from.

    y = llmc.linear(x, head); z = gather_rows(y, rows)  →  g = gather_rows(x, rows); z = llmc.linear(g, head)

Only over operators that compute each row from the same row of one operand; the result is the same to the bit.
"""

from __future__ import annotations

from torch import fx

from .graph import argument, calls, is_weight
from .rewrite import LAST_DIM, insert, is_elementwise, is_tensor, llmc, operator_of, rank_of


def gather_early(graph: fx.Graph) -> int:
    """Move every `gather_rows` up as far as it goes, in place; gives how many operators it passed."""
    moved = 0
    for gather in calls(graph, llmc.gather_rows.default):
        while True:
            higher = _step(graph, gather)
            if higher is None:
                break
            gather, moved = higher, moved + 1
    return moved


def _step(graph: fx.Graph, gather: fx.Node) -> fx.Node | None:
    """Gather the operand of what `gather` reads instead; None when that must stay whole."""
    source, rows = argument(gather, "x"), argument(gather, "rows")
    operand = _row_operand(source)
    if operand is None or len(source.users) > 1:
        return None
    with graph.inserting_before(gather):
        higher = insert(graph, llmc.gather_rows.default, (operand, rows))
        higher.meta["val"] = _with_rows(operand, rows)
        again = graph.node_copy(source, lambda node: higher if node is operand else node)
    again.meta["val"] = gather.meta["val"]
    gather.replace_all_uses_with(again)
    graph.erase_node(gather)
    graph.erase_node(source)
    return higher


def _row_operand(node: fx.Node) -> fx.Node | None:
    """The one operand whose rows `node` computes its own from."""
    name = operator_of(node)
    if not is_elementwise(node) and name not in LAST_DIM:
        return None
    operands = [source for source in node.all_input_nodes if not is_weight(source)]
    if len(operands) != 1 or not is_tensor(operands[0]) or rank_of(operands[0]) != rank_of(node):
        return None
    weights = [source for source in node.all_input_nodes if is_weight(source)]
    if is_elementwise(node) and any(rank_of(weight) >= rank_of(node) for weight in weights):
        return None
    return operands[0] if rank_of(node) > 1 else None


def _with_rows(operand: fx.Node, rows: fx.Node) -> object:
    value = operand.meta["val"]
    return value.new_empty((rows.meta["val"].shape[0], *value.shape[1:]))
