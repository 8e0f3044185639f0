"""Compute the gate and the up projection of a gated feed-forward block in one product.

    g = llmc.linear(x, wg, None)
    u = llmc.linear(x, wu, None)                    →    y = llmc.linear(x, wg+wu, None)
    h = llmc.gated_activation(g, u, 'silu')              h = llmc.gated_activation_packed(y, 'silu')

A product that is computed whole and then sliced in two halves (Phi-3, GLM) loses its slices alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import fx

from ..ir.program import Program
from ..ir.weights import Concat, Expr, Slice
from .base import CANONICAL, Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .fuse_linears import LINEAR, join_linears, obstacle
from .graph import argument, calls, erase_dead, is_call, read_weight
from .rewrite import insert

GATED = torch.ops.llmc.gated_activation.default
PACKED = torch.ops.llmc.gated_activation_packed.default


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseGateUp:
    """Join gate and up projections under each gated activation."""

    name: ClassVar[str] = "fuse_gate_up"
    stage: ClassVar[Stage] = Stage.fuse
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-6)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per gated activation; misses say why one keeps two inputs."""
        graph = program.copy_graph()
        added: dict[str, Expr] = {}
        misses: list[str] = []
        matches = 0
        for node in calls(graph, GATED):
            outcome = _joined(graph, program, node)
            if isinstance(outcome, str):
                misses.append(f"{node.name}: {outcome}")
                continue
            added |= outcome.added
            with graph.inserting_before(node):
                packed = insert(graph, PACKED, (outcome.linear, argument(node, "activation")))
            node.replace_all_uses_with(packed)
            graph.erase_node(node)
            matches += 1
        erase_dead(graph)
        done = program.replace(graph=graph, weights=program.weights.with_entries(added))
        return PassResult(program=done, report=PassReport(matches=matches, misses=tuple(misses)))


class _Joined(NamedTuple):
    """A linear whose result is gate then up, and the weights that are new."""

    linear: fx.Node
    added: dict[str, Expr]


class _Half(NamedTuple):
    """Columns `start` to `stop` of a linear's result."""

    linear: fx.Node
    start: int
    stop: int


def _joined(graph: fx.Graph, program: Program, node: fx.Node) -> _Joined | str:
    gate, up = _half(argument(node, "gate")), _half(argument(node, "up"))
    if gate is None or up is None:
        return "its gate or up is not the result of a linear"
    if gate.stop - gate.start != up.stop - up.start:
        return "its gate and up differ in width"
    if gate.linear is up.linear:
        return _from_halves(graph, program, gate, up)
    if _width(gate.linear) != gate.stop - gate.start or _width(up.linear) != up.stop - up.start:
        return "its gate and up are parts of larger products"
    if argument(gate.linear, "x") is not argument(up.linear, "x"):
        return "its gate and up read different inputs"
    if len(gate.linear.users) > 1 or len(up.linear.users) > 1:
        return "its gate or up is used elsewhere too"
    reason = obstacle([gate.linear, up.linear], program)
    return _Joined(*join_linears(graph, program, [gate.linear, up.linear])) if reason is None else reason


def _from_halves(graph: fx.Graph, program: Program, gate: _Half, up: _Half) -> _Joined | str:
    linear, width = gate.linear, gate.stop - gate.start
    if _width(linear) != 2 * width or {gate.start, up.start} != {0, width}:
        return "its gate and up are not the two halves of their product"
    if gate.start == 0:
        return _Joined(linear, {})
    if len(linear.users) > 2:
        return "its product is used elsewhere too, and its halves stand up before gate"
    reason = obstacle([linear], program)
    return _swap_halves(graph, program, linear, width) if reason is None else reason


def _swap_halves(graph: fx.Graph, program: Program, linear: fx.Node, width: int) -> _Joined:
    added: dict[str, Expr] = {}
    read: list[fx.Node | None] = []
    with graph.inserting_before(linear):
        for part in ("weight", "bias"):
            source = argument(linear, part)
            if source is None:
                read.append(None)
                continue
            expr = program.weights[str(source.target)]
            name = f"{source.target}.gate_first"
            added[name] = Concat((Slice(expr, 0, width, 2 * width), Slice(expr, 0, 0, width)), 0)
            read.append(read_weight(graph, name))
        swapped = insert(graph, LINEAR, (argument(linear, "x"), *read))
    return _Joined(swapped, added)


def _half(value: fx.Node) -> _Half | None:
    if is_call(value, LINEAR):
        return _Half(value, 0, _width(value))
    if not is_call(value, torch.ops.aten.slice.Tensor):
        return None
    source, dim = argument(value, "self"), argument(value, "dim")
    rank = value.meta["val"].dim()
    if not is_call(source, LINEAR) or dim % rank != rank - 1 or argument(value, "step") != 1:
        return None
    start = argument(value, "start") or 0
    return _Half(source, start, start + value.meta["val"].shape[-1]) if start >= 0 else None


def _width(linear: fx.Node) -> int:
    return int(linear.meta["val"].shape[-1])
