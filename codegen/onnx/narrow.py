"""Which nodes are computed for the wanted rows alone. Knows which operators' lowerings can."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.wanted_rows import wanted_alone

_BY_ROWS = (
    "llmc.linear", "llmc.quantized_linear", "llmc.rms_norm", "llmc.layer_norm", "llmc.add_rms_norm",
    "llmc.add_layer_norm", "llmc.gated_activation", "llmc.gated_activation_packed", "aten.add", "aten.mul",
    "aten.silu", "aten.gelu", "aten.relu", "aten.tanh",
)  # fmt: skip


def narrow_nodes(program: Program) -> frozenset[fx.Node]:
    """The nodes whose rows nobody reads but a gather of the wanted ones, and whose operands are matrices of
    as many rows, or weights."""
    return frozenset(wanted_alone(program.graph, _works_on_rows))


def _works_on_rows(node: fx.Node) -> bool:
    if str(node.target).rpartition(".")[0] not in _BY_ROWS:
        return False
    operands = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return all(_is_matrix(each.meta["val"]) for each in (node, *operands))


def _is_matrix(value: Any) -> bool:
    """Whether a value is of rows, a token each, or several such."""
    if isinstance(value, tuple):
        return all(map(_is_matrix, value))
    return isinstance(value, torch.Tensor) and value.dim() == 2 and isinstance(value.shape[0], torch.SymInt)
