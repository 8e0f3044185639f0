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
    return emitter.graph.op("RMSNormalization", emitter.value(node.args[0]), gamma, axis=-1, epsilon=eps)


def _add_rms_norm(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    weight, eps, offset = node.args[2:5]
    graph = emitter.graph
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]
    x, residual = emitter.value(node.args[0]), emitter.value(node.args[1])
    if emitter.contrib:
        return _skip(emitter, "SkipSimplifiedLayerNormalization", (x, residual, gamma), eps)
    total = graph.op("Add", x, residual)
    return graph.op("RMSNormalization", total, gamma, axis=-1, epsilon=eps), total


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
    inputs = (emitter.value(node.args[0]), gamma, emitter.optional(bias))
    return emitter.graph.ops("LayerNormalization", inputs, 1, axis=-1, epsilon=eps)[0]


def _add_layer_norm(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    weight, bias, eps, offset = node.args[2:6]
    graph = emitter.graph
    gamma = _gamma(emitter, weight, float(offset), _width(node))  # pyright: ignore[reportArgumentType]
    x, residual = emitter.value(node.args[0]), emitter.value(node.args[1])
    if emitter.contrib:
        return _skip(emitter, "SkipLayerNormalization", (x, residual, gamma, emitter.optional(bias)), eps)
    total = graph.op("Add", x, residual)
    inputs = (total, gamma, emitter.optional(bias))
    return graph.ops("LayerNormalization", inputs, 1, axis=-1, epsilon=eps)[0], total


LOWERINGS: dict[str, Lowering] = {
    "llmc.rms_norm": _rms_norm,
    "llmc.add_rms_norm": _add_rms_norm,
    "llmc.layer_norm": _layer_norm,
    "llmc.add_layer_norm": _add_layer_norm,
}
