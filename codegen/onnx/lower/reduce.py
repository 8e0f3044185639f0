"""Reductions, softmax, and choices of the largest."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import fx

from ....ir.arguments import argument, argument_names
from ..emitter import Emitter, Lowering
from ..graph import BOOL, FLOAT, INT64


def _dims(node: fx.Node) -> list[int]:
    """The reduced dimensions, all where none are named."""
    source: Any = node.args[0]
    rank = len(source.meta["val"].shape)
    given: Any = argument(node, "dim") if "dim" in argument_names(node) else None
    if given is None or given == []:
        return list(range(rank))
    return [dim % rank for dim in (given if isinstance(given, list | tuple) else [given])]


def _keeps(node: fx.Node) -> int:
    return int("keepdim" in argument_names(node) and bool(argument(node, "keepdim")))


def _reduction(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        value = emitter.operand(node.args[0], emitter.dtype_of(node))
        return emitter.graph.op(kind, value, emitter.graph.ints(*_dims(node)), keepdims=_keeps(node))

    return lower


def _any(emitter: Emitter, node: fx.Node) -> ir.Value:
    source = emitter.graph.cast(emitter.operand(node.args[0], BOOL), INT64)
    found = emitter.graph.op("ReduceMax", source, emitter.graph.ints(*_dims(node)), keepdims=_keeps(node))
    return emitter.graph.cast(found, BOOL)


def _extreme(kind: str, arg: str) -> Lowering:
    """max.dim and min.dim: values and indices of the first."""

    def lower(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
        (dim,) = _dims(node)
        value, graph = emitter.value(node.args[0]), emitter.graph
        best = graph.op(kind, value, graph.ints(dim), keepdims=_keeps(node))
        return best, graph.op(arg, value, axis=dim, keepdims=_keeps(node))

    return lower


def _arg(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        given: Any = argument(node, "dim")
        value, graph = emitter.value(node.args[0]), emitter.graph
        if given is None:
            flat = graph.reshape(value, graph.ints(-1))
            return graph.op(kind, flat, axis=0, keepdims=0)
        return graph.op(kind, value, axis=given, keepdims=_keeps(node))

    return lower


def _softmax(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    return emitter.graph.op("Softmax", emitter.operand(node.args[0], FLOAT), axis=dim)


def _topk(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    count: Any = node.args[1]
    dim: Any = argument(node, "dim")
    largest: Any = argument(node, "largest")
    k = emitter.scalar(emitter.size(count))
    values, indices = emitter.graph.ops(
        "TopK", (emitter.value(node.args[0]), k), 2, axis=dim, largest=int(bool(largest))
    )
    return values, indices


def _sort(emitter: Emitter, node: fx.Node) -> tuple[ir.Value, ir.Value]:
    dim: Any = argument(node, "dim")
    descending: Any = argument(node, "descending")
    source: Any = node.args[0]
    k = emitter.scalar(emitter.size(source.meta["val"].shape[dim]))
    values, indices = emitter.graph.ops(
        "TopK", (emitter.value(source), k), 2, axis=dim, largest=int(bool(descending))
    )
    return values, indices


def _cumsum(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    value = emitter.operand(node.args[0], emitter.dtype_of(node))
    return emitter.graph.op("CumSum", value, emitter.graph.number(dim, INT64))


def _variance(root: bool) -> Lowering:
    """var.correction and std.correction."""

    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        graph, value, dims = emitter.graph, emitter.value(node.args[0]), _dims(node)
        source: Any = node.args[0]
        axes, keep = graph.ints(*dims), int(bool(node.kwargs.get("keepdim", False)))
        correction: Any = node.kwargs.get("correction", 1)
        count = 1
        for dim in dims:
            count *= int(source.meta["val"].shape[dim])
        centred = graph.op("Sub", value, graph.op("ReduceMean", value, axes, keepdims=1))
        total = graph.op("ReduceSum", graph.op("Mul", centred, centred), axes, keepdims=keep)
        result = graph.op(
            "Div", total, graph.number(float(count - (1 if correction is None else correction)))
        )
        return graph.op("Sqrt", result) if root else result

    return lower


LOWERINGS: dict[str, Lowering] = {
    "aten.sum": _reduction("ReduceSum"),
    "aten.mean": _reduction("ReduceMean"),
    "aten.amax": _reduction("ReduceMax"),
    "aten.amin": _reduction("ReduceMin"),
    "aten.logsumexp": _reduction("ReduceLogSumExp"),
    "aten.any": _any,
    "aten.max.dim": _extreme("ReduceMax", "ArgMax"),
    "aten.min.dim": _extreme("ReduceMin", "ArgMin"),
    "aten.argmax": _arg("ArgMax"),
    "aten.argmin": _arg("ArgMin"),
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "aten.topk": _topk,
    "aten.sort": _sort,
    "aten.cumsum": _cumsum,
    "aten.var": _variance(root=False),
    "aten.std": _variance(root=True),
}
