"""Matrix products and table look-ups, plain and quantised."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import fx

from ....ir.arguments import argument
from ..emitter import Emitter, Lowering
from ..forms import parts_of
from ..graph import FLOAT, INT64
from ..quantized import Matrix, accuracy_of, block_linear, block_rows, dequantized


def _linear(emitter: Emitter, node: fx.Node) -> ir.Value:
    bias = emitter.optional(argument(node, "bias"))
    return _product(emitter, node, emitter.value(node.args[1]), bias)


def _product(emitter: Emitter, node: fx.Node, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """`x @ weight.T + bias` over all leading dimensions of x at once."""
    source: Any = node.args[0]
    value = emitter.operand(source, FLOAT)
    if len(source.meta["val"].shape) == 2:
        return emitter.graph.ops("Gemm", (value, weight, bias), 1, transB=1)[0]
    flat = emitter.graph.reshape(value, emitter.graph.ints(-1, int(source.meta["val"].shape[-1])))
    out = emitter.graph.ops("Gemm", (flat, weight, bias), 1, transB=1)[0]
    return emitter.reshape(out, emitter.shape_of(node))


def _quantized_linear(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    matrix = _matrix(node, int(node.meta["val"].shape[-1]), int(source.meta["val"].shape[-1]))
    bias = emitter.optional(argument(node, "bias"))
    if not emitter.contrib or not matrix.block:
        return _product(emitter, node, _dequantized(emitter, matrix), bias)
    accuracy = accuracy_of(str(argument(node, "activation")), matrix.parts.scheme.group_size or matrix.width)
    return block_linear(emitter, emitter.value(source), matrix, bias, accuracy)


def _matrix(node: fx.Node, rows: int, width: int) -> Matrix:
    return Matrix(parts=parts_of(node, "", "scheme"), rows=rows, width=width)


def _dequantized(emitter: Emitter, matrix: Matrix) -> ir.Value:
    return emitter.once(("dequantized", matrix.parts.codes), lambda: dequantized(emitter, matrix))


def _embedding(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[1] if str(node.target).startswith("llmc") else node.args[0]
    ids: Any = node.args[0] if str(node.target).startswith("llmc") else node.args[1]
    rows = emitter.graph.op(
        "Gather", emitter.stored.raw(emitter.graph, str(source.target)), emitter.value(ids), axis=0
    )
    if (
        source.meta["val"].dtype == node.meta["val"].dtype
        and str(source.meta["val"].dtype) == "torch.float32"
    ):
        return rows
    return emitter.graph.cast(rows, FLOAT)


def _quantized_embedding(emitter: Emitter, node: fx.Node) -> ir.Value:
    codes: Any = argument(node, "codes")
    width: Any = argument(node, "width")
    matrix = _matrix(node, int(codes.meta["val"].shape[0]), int(width))
    ids = emitter.operand(node.args[0], INT64)
    if emitter.contrib and matrix.block:
        return block_rows(emitter, ids, matrix)
    return dequantized_rows(emitter, ids, matrix)


def dequantized_rows(emitter: Emitter, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows of a quantised table without operators of its own: nibbles cannot be gathered, so a 4-bit table is
    dequantised whole, which loading does once."""
    if matrix.bits == 8:
        return dequantized(emitter, matrix, ids)
    return emitter.graph.op("Gather", _dequantized(emitter, matrix), ids, axis=0)


def _matmul(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.graph.op("MatMul", *(emitter.operand(arg, FLOAT) for arg in node.args[:2]))


def _addmm(emitter: Emitter, node: fx.Node) -> ir.Value:
    bias, left, right = (emitter.operand(arg, FLOAT) for arg in node.args[:3])
    return emitter.graph.op("Add", emitter.graph.op("MatMul", left, right), bias)


LOWERINGS: dict[str, Lowering] = {
    "llmc.linear": _linear,
    "aten.linear": _linear,
    "llmc.quantized_linear": _quantized_linear,
    "llmc.embedding": _embedding,
    "aten.embedding": _embedding,
    "llmc.quantized_embedding": _quantized_embedding,
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm"), _matmul),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm"), _addmm),
}
