"""Add to the residual stream and normalise the sum in one operator.

    s = aten.add(x, r)                                   f = llmc.add_rms_norm(x, r, w, 1e-05, 0.0, style)
    n = llmc.rms_norm(s, w, 1e-05, 0.0, style)      →    n = f[0]
    (others read s)                                      s = f[1]

Of several norms of one sum the first takes the addition, the others read its result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..ir.program import Program
from .base import CANONICAL, Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .graph import argument, argument_names, calls, erase_dead, is_call, is_weight
from .rewrite import insert, same_shape

ADD = torch.ops.aten.add.Tensor
FUSED = {
    torch.ops.llmc.rms_norm.default: torch.ops.llmc.add_rms_norm.default,
    torch.ops.llmc.layer_norm.default: torch.ops.llmc.add_layer_norm.default,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseAddNorm:
    """Join each residual addition with the norm that reads it."""

    name: ClassVar[str] = "fuse_add_norm"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per joined pair; misses name norms of a sum that stay apart from it."""
        graph = program.copy_graph()
        return PassResult(program=program.replace(graph=graph), report=fuse_sums(graph))


def fuse_sums(graph: fx.Graph) -> PassReport:
    """Join each sum with the first norm that reads it, in place."""
    misses: list[str] = []
    matches = 0
    for norm in calls(graph, *FUSED):
        total = argument(norm, "x")
        if not is_call(total, ADD):
            continue
        reason = _obstacle(norm, total)
        if reason is not None:
            misses.append(f"{norm.name}: {reason}")
            continue
        _fuse(graph, norm, total)
        matches += 1
    erase_dead(graph)
    return PassReport(matches=matches, misses=tuple(misses))


def _obstacle(norm: fx.Node, total: fx.Node) -> str | None:
    sides: list[Any] = [argument(total, "self"), argument(total, "other")]
    if not all(isinstance(side, fx.Node) for side in sides) or argument(total, "alpha") != 1:
        return "its sum has a constant or a factor"
    values = [side.meta["val"] for side in sides]
    if any(not isinstance(value, torch.Tensor) for value in values):
        return "its sum is not one of two tensors"
    if values[0].dtype != values[1].dtype or not same_shape(values[0].shape, values[1].shape):
        return "the two sides of its sum differ in dtype or shape"
    if any(not is_weight(source) for source in norm.all_input_nodes if source is not total):
        return "its weight is computed in the graph"
    return None


def _fuse(graph: fx.Graph, norm: fx.Node, total: fx.Node) -> None:
    for weight in norm.all_input_nodes:
        if weight is not total and weight > total:
            total.prepend(weight)
    rest = [argument(norm, name) for name in argument_names(norm)[1:]]
    with graph.inserting_before(total):
        args = (argument(total, "self"), argument(total, "other"), *rest)
        fused = insert(graph, FUSED[norm.target], args)  # pyright: ignore[reportArgumentType]
        normed = graph.call_function(operator.getitem, (fused, 0))
        summed = graph.call_function(operator.getitem, (fused, 1))
    normed.meta["val"], summed.meta["val"] = norm.meta["val"], total.meta["val"]
    norm.replace_all_uses_with(normed)
    graph.erase_node(norm)
    total.replace_all_uses_with(summed)
    graph.erase_node(total)
