"""Mixtures of experts in standard operators: a loop over experts, each computing the rows that chose it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from ....ir.arguments import argument, argument_names
from ..emitter import Emitter, Lowering
from ..forms import parts_of
from ..graph import BOOL, FLOAT, INT64
from ..quantized import Matrix, dequantized, rounded
from .elementwise import activation


class _Mixture:
    """One mixture: its inputs as values, and the settings of an expert."""

    def __init__(
        self, emitter: Emitter, node: fx.Node, gate_up: ir.Value, down: ir.Value, inner: int
    ) -> None:
        self.width, self.inner = int(node.meta["val"].shape[-1]), inner
        self.x, self.weights = (emitter.value(argument(node, name)) for name in ("x", "expert_weights"))
        self.ids = emitter.operand(argument(node, "expert_ids"), INT64)
        self.gate_up, self.down = gate_up, down
        self.gate_up_bias = emitter.optional(argument(node, "gate_up_bias"))
        self.down_bias = emitter.optional(argument(node, "down_bias"))
        self.activation = str(argument(node, "activation"))
        self.interleaved = bool(argument(node, "interleaved"))
        names = argument_names(node)
        self.rounding = str(argument(node, "activation_scheme")) if "activation_scheme" in names else ""
        self.alpha, self.limit = float(argument(node, "alpha")), float(argument(node, "limit"))


def _moe(emitter: Emitter, node: fx.Node) -> ir.Value:
    matrices: list[Any] = [argument(node, name) for name in ("gate_up", "down")]
    num_experts = int(matrices[0].meta["val"].shape[0])
    gate_up, down = (emitter.value(matrix) for matrix in matrices)
    return _loop(
        emitter, _Mixture(emitter, node, gate_up, down, int(matrices[1].meta["val"].shape[2])), num_experts
    )


def _quantized_moe(emitter: Emitter, node: fx.Node) -> ir.Value:
    x: Any = argument(node, "x")
    codes: Any = argument(node, "gate_up_codes")
    down_codes: Any = argument(node, "down_codes")
    experts, wide = (int(dim) for dim in codes.meta["val"].shape[:2])
    inner = wide if str(argument(node, "activation")).startswith("plain:") else wide // 2
    rows = int(down_codes.meta["val"].shape[1])
    gate_up = _stack(emitter, node, "gate_up", experts, wide, int(x.meta["val"].shape[-1]))
    down = _stack(emitter, node, "down", experts, rows, inner)
    return _loop(emitter, _Mixture(emitter, node, gate_up, down, inner), experts)


def _stack(emitter: Emitter, node: fx.Node, name: str, experts: int, rows: int, width: int) -> ir.Value:
    """All experts' matrices as float32 `[experts, rows, width]`, which loading does once."""
    parts = parts_of(node, f"{name}_", f"{name}_scheme")
    flat = dequantized(emitter, Matrix(parts=parts, rows=experts * rows, width=width))
    return emitter.graph.reshape(flat, emitter.graph.ints(experts, rows, width))


def _loop(emitter: Emitter, mixture: _Mixture, num_experts: int) -> ir.Value:
    """Sum over experts, one after the other: `[T, D]`."""
    graph = emitter.graph
    start = graph.op("Mul", mixture.x, graph.number(0.0))
    count, always = graph.number(num_experts, INT64), graph.number(True, BOOL)
    index = ir.Value(name=f"{graph.scope}/expert", type=ir.TensorType(INT64), shape=ir.Shape([]))
    keep = ir.Value(name=f"{graph.scope}/keep", type=ir.TensorType(BOOL), shape=ir.Shape([]))
    total = ir.Value(name=f"{graph.scope}/total", type=ir.TensorType(FLOAT), shape=start.shape)
    with graph.body() as nodes:
        on = graph.op("Identity", keep)
        on.dtype = BOOL
        places = graph.op("NonZero", graph.op("Equal", mixture.ids, index))
        is_chosen = graph.op("Greater", graph.op("Size", places), graph.number(0, INT64))
        new = _choice(emitter, is_chosen, lambda: _add_expert(emitter, mixture, index, places, total), total)
        body = _subgraph(nodes, [index, keep, total], [on, new], "expert")
    return graph.op("Loop", count, always, start, body=body)


def _choice(
    emitter: Emitter, condition: ir.Value, make: Callable[[], ir.Value], otherwise: ir.Value
) -> ir.Value:
    """`make()` where `condition` holds, else `otherwise`; only the one needed is computed."""
    graph = emitter.graph
    with graph.body() as nodes:
        then = _subgraph(nodes, [], [make()], "chosen")
    with graph.body() as nodes:
        other = _subgraph(nodes, [], [graph.op("Identity", otherwise)], "idle")
    return graph.op("If", condition, then_branch=then, else_branch=other)


def _subgraph(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], name: str) -> ir.Graph:
    for value in outputs:
        value.dtype = value.dtype or FLOAT
    return ir.Graph(inputs, outputs, nodes=nodes, name=name)


def _add_expert(
    emitter: Emitter, mixture: _Mixture, index: ir.Value, places: ir.Value, total: ir.Value
) -> ir.Value:
    """`total` with one expert's results added to the rows that chose it. `places[2, n]` are (row, choice)."""
    graph = emitter.graph
    rows = graph.op("Gather", places, graph.number(0, INT64), axis=0)
    shares = graph.op("GatherND", mixture.weights, graph.op("Transpose", places, perm=[1, 0]))
    out = _expert(emitter, mixture, index, graph.op("Gather", mixture.x, rows, axis=0))
    scaled = graph.op("Mul", out, graph.op("Unsqueeze", shares, graph.ints(1)))
    where = graph.op("Unsqueeze", rows, graph.ints(1))
    return graph.op("ScatterND", total, where, scaled, reduction="add")


def _expert(emitter: Emitter, mixture: _Mixture, index: ir.Value, x: ir.Value) -> ir.Value:
    graph = emitter.graph

    def product(value: ir.Value, weights: ir.Value, biases: ir.Value | None) -> ir.Value:
        weight = graph.op("Gather", weights, index, axis=0)
        bias = None if biases is None else graph.op("Gather", biases, index, axis=0)
        return graph.ops("Gemm", (value, weight, bias), 1, transB=1)[0]

    x = rounded(emitter, x, mixture.width, mixture.rounding, None)
    hidden = _activated(emitter, mixture, product(x, mixture.gate_up, mixture.gate_up_bias))
    hidden = rounded(emitter, hidden, mixture.inner, mixture.rounding, None)
    return product(hidden, mixture.down, mixture.down_bias)


def _activated(emitter: Emitter, mixture: _Mixture, hidden: ir.Value) -> ir.Value:
    graph, name = emitter.graph, mixture.activation
    if name.startswith("plain:"):
        return activation(emitter, hidden, name.removeprefix("plain:"))
    if mixture.interleaved:
        gate, up = (_every_second(emitter, hidden, first) for first in (0, 1))
    else:
        gate, up = graph.ops("Split", (hidden,), 2, axis=-1, num_outputs=2)
    if name == "clamped_swiglu":
        return _clamped(emitter, mixture, gate, up)
    return graph.op("Mul", activation(emitter, gate, name), up)


def _every_second(emitter: Emitter, value: ir.Value, first: int) -> ir.Value:
    ints = emitter.graph.ints
    return emitter.graph.op("Slice", value, ints(first), ints(2**62), ints(1), ints(2))


def _clamped(emitter: Emitter, mixture: _Mixture, gate: ir.Value, up: ir.Value) -> ir.Value:
    """`(up + 1) * gate * sigmoid(alpha * gate)` with gate <= limit and |up| <= limit."""
    graph = emitter.graph
    limit, floor = graph.number(mixture.limit), graph.number(-mixture.limit)
    gate = graph.op("Min", gate, limit)
    up = graph.op("Max", graph.op("Min", up, limit), floor)
    share = graph.op("Sigmoid", graph.op("Mul", gate, graph.number(mixture.alpha)))
    return graph.op("Mul", graph.op("Add", up, graph.number(1.0)), graph.op("Mul", gate, share))


LOWERINGS: dict[str, Lowering] = {"llmc.moe": _moe, "llmc.quantized_moe": _quantized_moe}
