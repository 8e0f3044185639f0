"""Normalisation, alone and with the addition before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from ..emitter import Emitter, Lowering
from ..graph import MICROSOFT


def _gamma(emitter: Emitter, weight: Any, offset: float, width: int) -> ir.Value:
    """`weight + offset`, or ones."""
    if weight is None:
        return emitter.constant(np.ones(width, dtype=np.float32))
    value = emitter.value(weight)
    if not offset:
        return value
    return emitter.once(
        ("gamma", weight.target, offset),
        lambda: emitter.graph.op("Add", value, emitter.graph.number(offset)),
    )


def _width(node: fx.Node) -> int:
    source: Any = node.args[0]
    return int(source.meta["val"].shape[-1])


def _rms_norm(emitter: Emitter, node: fx.Node) -> ir.Value:
    weight, eps, offset = node.args[1:4]
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]
    if addends := _wanted_sum(emitter, node):
        return emitter.by_rows(
            node,
            addends,
            lambda pair: _skip(emitter, "SkipSimplifiedLayerNormalization", (*pair, gamma), eps)[0],
        )
    return emitter.by_rows(
        node, node.args[:1], lambda x: emitter.graph.op("RMSNormalization", *x, gamma, axis=-1, epsilon=eps)
    )


def _wanted_sum(emitter: Emitter, node: fx.Node) -> tuple[fx.Node, ...]:
    """The two values whose sum, at the wanted rows, `node` alone reads: the end of the last layer, where a
    program has the choice of rows between the sum and its norm. Empty where there are none."""
    rows: Any = node.args[0]
    total: Any = rows.args[0] if str(rows.target) == "llmc.gather_rows.default" else None
    if not emitter.contrib or total not in emitter.narrow or len(rows.users) + len(total.users) > 2:
        return ()
    is_sum = str(total.target) == "aten.add.Tensor" and len(total.args) == 2 and not total.kwargs
    return tuple(total.args) if is_sum and all(each in emitter.narrow for each in total.args) else ()


def _add_rms_norm(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    weight, eps, offset = node.args[2:5]
    graph = emitter.graph
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]

    def make(pair: tuple[ir.Value, ...]) -> tuple[ir.Value, ir.Value]:
        if emitter.contrib:
            return _skip(emitter, "SkipSimplifiedLayerNormalization", (*pair, gamma), eps)
        total = graph.op("Add", *pair)
        return graph.op("RMSNormalization", total, gamma, axis=-1, epsilon=eps), total

    return emitter.by_rows(node, node.args[:2], make)


def _skip(
    emitter: Emitter, kind: str, inputs: tuple[ir.Value | None, ...], eps: Any
) -> tuple[ir.Value, ir.Value]:
    """A contrib operator that adds and normalises: its outputs are the norm, two unused, and the sum."""
    outputs = emitter.graph.ops(kind, inputs, 4, domain=MICROSOFT, epsilon=eps)
    for unused in outputs[1:3]:
        unused.name = ""
    return outputs[0], outputs[3]


def _layer_norm(emitter: Emitter, node: fx.Node) -> ir.Value:
    weight, bias, eps, offset = node.args[1:5]
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]
    beta = emitter.optional(bias)
    return emitter.by_rows(
        node,
        node.args[:1],
        lambda x: emitter.graph.op("LayerNormalization", *x, gamma, beta, axis=-1, epsilon=eps),
    )


def _add_layer_norm(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    weight, bias, eps, offset = node.args[2:6]
    graph = emitter.graph
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]
    beta = emitter.optional(bias)

    def make(pair: tuple[ir.Value, ...]) -> tuple[ir.Value, ir.Value]:
        if emitter.contrib:
            return _skip(emitter, "SkipLayerNormalization", (*pair, gamma, beta), eps)
        total = graph.op("Add", *pair)
        return graph.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=eps), total

    return emitter.by_rows(node, node.args[:2], make)


LOWERINGS: dict[str, Lowering] = {
    "llmc.rms_norm": _rms_norm,
    "llmc.add_rms_norm": _add_rms_norm,
    "llmc.layer_norm": _layer_norm,
    "llmc.add_layer_norm": _add_layer_norm,
}
