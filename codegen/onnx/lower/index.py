"""Gathering and scattering."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import fx

from ....spec.errors import TargetError
from ..emitter import Emitter, Lowering
from ..graph import INT64


def _gather(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    return emitter.graph.op(
        "GatherElements", emitter.value(node.args[0]), emitter.value(node.args[2]), axis=dim
    )


def _index_select(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    return emitter.graph.op("Gather", emitter.value(node.args[0]), emitter.value(node.args[2]), axis=dim)


def _gather_rows(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    rows: Any = node.args[1]
    if source in emitter.narrow or (emitter.frame.logits == "all" and rows.op == "placeholder"):
        return emitter.value(source)
    if rows.op == "placeholder":
        return emitter.wanted_rows(source)
    return emitter.graph.op("Gather", emitter.value(source), emitter.value(rows), axis=0)


def _index(emitter: Emitter, node: fx.Node) -> ir.Value:
    indexes: Any = node.args[1]
    given = [(dim, index) for dim, index in enumerate(indexes) if index is not None]
    if len(given) != 1:
        raise TargetError(
            "onnx.index",
            "The model indexes a tensor by several tensors at once.",
            f"Node {node.name!r} of {emitter.graph.scope or 'the model itself'} does, and the ONNX target "
            "takes one index tensor.",
            "Compile for another target, and report the model.",
        )
    dim, index = given[0]
    return emitter.graph.op("Gather", emitter.value(node.args[0]), emitter.operand(index, INT64), axis=dim)


def _scatter(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    source: Any = node.args[3]
    index: Any = node.args[2]
    value = emitter.operand(source, emitter.dtype_of(node))
    if not isinstance(source, fx.Node):
        value = emitter.graph.op("Expand", value, emitter.shape_vector(emitter.shape_of(index)))
    data = emitter.operand(node.args[0], emitter.dtype_of(node))
    return emitter.graph.op("ScatterElements", data, emitter.value(index), value, axis=dim)


def _scatter_add(emitter: Emitter, node: fx.Node) -> ir.Value:
    dim: Any = node.args[1]
    data, index, value = (emitter.value(node.args[at]) for at in (0, 2, 3))
    return emitter.graph.op("ScatterElements", data, index, value, axis=dim, reduction="add")


def _region(emitter: Emitter, node: fx.Node) -> ir.Value:
    """slice_scatter and select_scatter with known bounds: what is before, the part, and what is behind."""
    source: Any = node.args[0]
    arguments: list[Any] = [*node.args[2:], *([None] * (6 - len(node.args)))]
    shape = emitter.shape_of(source)
    dim = (arguments[0] or 0) % len(shape)
    graph, part = emitter.graph, emitter.value(node.args[1])
    start = arguments[1] or 0
    if "select" in str(node.target):
        part, stop = graph.op("Unsqueeze", part, graph.ints(dim)), start + 1
    else:
        stop = arguments[2]
    if (arguments[3] or 1) != 1 or not isinstance(start, int):
        raise TargetError(
            "onnx.slice_scatter",
            "The model writes a strided region of a tensor.",
            f"Node {node.name!r} of {graph.scope or 'the model itself'} does, and the ONNX target writes "
            "regions without gaps.",
            "Compile for another target, and report the model.",
        )
    if start < 0:
        raise AssertionError("tracing makes starts positive")
    data, axes = emitter.value(source), graph.ints(dim)
    pieces = [graph.op("Slice", data, graph.ints(0), graph.ints(start), axes)] if start else []
    pieces.append(part)
    if stop is not None and not (shape[dim].is_number and int(stop) >= int(shape[dim])) and stop < 2**62:
        pieces.append(graph.op("Slice", data, graph.ints(stop), graph.ints(2**62), axes))
    return graph.op("Concat", *pieces, axis=dim) if len(pieces) > 1 else part


LOWERINGS: dict[str, Lowering] = {
    "aten.gather": _gather,
    "aten.index_select": _index_select,
    "llmc.gather_rows": _gather_rows,
    "aten.index": _index,
    "aten.scatter": _scatter,
    "aten.scatter_add": _scatter_add,
    "aten.slice_scatter": _region,
    "aten.select_scatter": _region,
}
