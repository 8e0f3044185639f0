"""Mixtures of experts: QMoE where it computes what the program says, else a loop over experts in standard
operators, each computing the rows that chose it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx

from ....ir.arguments import argument, argument_names
from ..emitter import Emitter, Lowering
from ..forms import Parts, parts_of
from ..graph import BOOL, FLOAT, INT64, MICROSOFT
from ..mixtures import QMOE_ACTIVATIONS, block_size, inner_width, misfit
from ..quantized import expert_matrix, rounded
from .elementwise import activation

# One expert's matrix by the name of a product (`gate_up` or `down`) and the expert's number.
_Matrices = Callable[[str, ir.Value], ir.Value]


class _Mixture:
    """One mixture: its inputs as values, and the settings of an expert."""

    def __init__(
        self, emitter: Emitter, node: fx.Node, num_experts: int, inner: int, matrix: _Matrices
    ) -> None:
        self.num_experts, self.inner, self.matrix = num_experts, inner, matrix
        self.width = int(node.meta["val"].shape[-1])
        self.x, self.weights = (emitter.value(argument(node, name)) for name in ("x", "expert_weights"))
        self.ids = emitter.operand(argument(node, "expert_ids"), INT64)
        self.gate_up_bias = emitter.optional(argument(node, "gate_up_bias"))
        self.down_bias = emitter.optional(argument(node, "down_bias"))
        self.activation = str(argument(node, "activation"))
        self.interleaved = bool(argument(node, "interleaved"))
        names = argument_names(node)
        self.rounding = str(argument(node, "activation_scheme")) if "activation_scheme" in names else ""
        self.alpha, self.limit = float(argument(node, "alpha")), float(argument(node, "limit"))


def _moe(emitter: Emitter, node: fx.Node) -> ir.Value:
    stacks: dict[str, Any] = {name: argument(node, name) for name in ("gate_up", "down")}
    experts, _, inner = (int(dim) for dim in stacks["down"].meta["val"].shape)

    def matrix(name: str, index: ir.Value) -> ir.Value:
        return emitter.graph.op("Gather", emitter.value(stacks[name]), index, axis=0)

    return _loop(emitter, _Mixture(emitter, node, experts, inner, matrix))


def _quantized_moe(emitter: Emitter, node: fx.Node) -> ir.Value:
    experts, inner = int(argument(node, "gate_up_codes").meta["val"].shape[0]), inner_width(node)
    parts = {name: parts_of(node, f"{name}_", f"{name}_scheme") for name in ("gate_up", "down")}
    widths = {"gate_up": int(node.meta["val"].shape[-1]), "down": inner}

    def matrix(name: str, index: ir.Value) -> ir.Value:
        return expert_matrix(emitter, parts[name], index, widths[name])

    mixture = _Mixture(emitter, node, experts, inner, matrix)
    if emitter.contrib and not misfit(node):
        return _qmoe(emitter, node, mixture, parts)
    return _loop(emitter, mixture)


def _qmoe(emitter: Emitter, node: fx.Node, mixture: _Mixture, parts: dict[str, Parts]) -> ir.Value:
    """All experts by QMoE. The choice is the program's: a 1 for each chosen expert is all that its own
    choice is given to choose from, and shares come beside it."""
    graph = emitter.graph
    count = graph.ints(mixture.num_experts)
    rows = graph.op("Concat", graph.op("Shape", mixture.ids, start=0, end=1), count, axis=0)
    none = graph.op("Expand", graph.number(0.0), rows)
    ones = graph.op("Expand", graph.number(1.0), graph.op("Shape", mixture.ids))
    chosen, shares = (
        graph.op("ScatterElements", none, mixture.ids, values, axis=1) for values in (ones, mixture.weights)
    )
    block = block_size(node)
    widths = {"gate_up": mixture.width, "down": mixture.inner}
    products = [_qmoe_weights(emitter, parts[name], block, widths[name]) for name in ("gate_up", "down")]
    biases = mixture.gate_up_bias, mixture.down_bias
    (codes, scales, zeros), (down_codes, down_scales, down_zeros) = products
    activation = QMOE_ACTIVATIONS[mixture.activation]
    is_clamped = mixture.activation == "clamped_swiglu"
    return graph.op(
        "QMoE", mixture.x, chosen, codes, scales, biases[0], down_codes, down_scales, biases[1],
        None, None, None, zeros, down_zeros, None, shares,
        domain=MICROSOFT, k=int(argument(node, "expert_ids").meta["val"].shape[1]),
        activation_type=activation, expert_weight_bits=4, weights_prepacked=0, normalize_routing_weights=0,
        block_size=block or None,
        swiglu_fusion=1 if activation == "swiglu" else None,
        activation_alpha=(mixture.alpha if is_clamped else 1.0) if activation == "swiglu" else None,
        activation_beta=(1.0 if is_clamped else 0.0) if activation == "swiglu" else None,
        swiglu_limit=mixture.limit if is_clamped else None,
    )  # fmt: skip


def _qmoe_weights(
    emitter: Emitter, parts: Parts, block: int, width: int
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points of one product. Scales of whole rows have no third dimension; where the
    other product has blocks, they are repeated."""
    graph, shape = emitter.graph, emitter.stored.shape(parts.scales)
    scales = emitter.stored.plain(graph, parts.scales)
    if not block:
        scales = graph.reshape(scales, graph.ints(*shape[:2]))
    elif shape[2] != width // block:
        scales = graph.op("Expand", scales, graph.ints(*shape[:2], width // block))
    zeros = None if parts.zeros is None else emitter.stored.raw(graph, parts.zeros)
    return emitter.stored.raw(graph, parts.codes), scales, zeros


def _loop(emitter: Emitter, mixture: _Mixture) -> ir.Value:
    """Sum over experts, one after the other: `[T, D]`."""
    graph = emitter.graph
    start = graph.op("Mul", mixture.x, graph.number(0.0))
    count, always = graph.number(mixture.num_experts, INT64), graph.number(True, BOOL)
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

    def product(value: ir.Value, name: str, biases: ir.Value | None) -> ir.Value:
        bias = None if biases is None else graph.op("Gather", biases, index, axis=0)
        return graph.ops("Gemm", (value, mixture.matrix(name, index), bias), 1, transB=1)[0]

    x = rounded(emitter, x, mixture.width, mixture.rounding, None)
    hidden = _activated(emitter, mixture, product(x, "gate_up", mixture.gate_up_bias))
    hidden = rounded(emitter, hidden, mixture.inner, mixture.rounding, None)
    return product(hidden, "down", mixture.down_bias)


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
