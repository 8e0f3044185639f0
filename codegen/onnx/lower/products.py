"""Matrix products and table look-ups, plain and quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ....ir.arguments import argument
from ..emitter import Emitter, Lowering
from ..forms import parts_of
from ..graph import FLOAT, INT64
from ..quantized import Matrix, block_linear, block_rows, dequantized, rounded, rounds_itself


def _linear(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    bias = emitter.optional(argument(node, "bias"))
    return product(emitter, node, emitter.operand(source, FLOAT), emitter.value(node.args[1]), bias)


def product(
    emitter: Emitter, node: fx.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """`x @ weight.T + bias` in the shape of `node`, over all leading dimensions of x at once."""
    source: Any = node.args[0]
    if len(source.meta["val"].shape) == 2:
        return emitter.graph.ops("Gemm", (x, weight, bias), 1, transB=1)[0]
    flat = emitter.graph.reshape(x, emitter.graph.ints(-1, int(source.meta["val"].shape[-1])))
    out = emitter.graph.ops("Gemm", (flat, weight, bias), 1, transB=1)[0]
    return emitter.reshape(out, emitter.shape_of(node))


def _quantized_linear(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    matrix = _matrix(node, int(node.meta["val"].shape[-1]), int(source.meta["val"].shape[-1]))
    bias = emitter.optional(argument(node, "bias"))
    activation = str(argument(node, "activation")) or emitter.activations.get(matrix.parts.codes, "")
    by_blocks = emitter.contrib and matrix.block > 0
    if by_blocks and (not activation or rounds_itself(activation, matrix)):
        accuracy = 4 if activation else 1
        return emitter.by_rows(
            node, node.args[:1], lambda rows: block_linear(emitter, rows[0], matrix, bias, accuracy)
        )
    scale = emitter.optional(argument(node, "activation_scale"))
    x = rounded(emitter, emitter.operand(source, FLOAT), matrix.width, activation, scale)
    if by_blocks:
        return block_linear(emitter, x, matrix, bias, accuracy=1)
    return product(emitter, node, x, _dequantized(emitter, matrix), bias)


def _matrix(node: fx.Node, rows: int, width: int) -> Matrix:
    return Matrix(parts=parts_of(node, "", "scheme"), rows=rows, width=width)


def _dequantized(emitter: Emitter, matrix: Matrix) -> ir.Value:
    return emitter.once(("dequantized", matrix.parts.codes), lambda: dequantized(emitter, matrix))


def _embedding(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[1] if str(node.target).startswith("llmc") else node.args[0]
    ids: Any = node.args[0] if str(node.target).startswith("llmc") else node.args[1]
    table = emitter.stored.raw(emitter.graph, str(source.target))
    is_wide = source.meta["val"].dtype == node.meta["val"].dtype == torch.float32

    def make(which: ir.Value) -> ir.Value:
        rows = emitter.graph.op("Gather", table, which, axis=0)
        return rows if is_wide else emitter.graph.cast(rows, FLOAT)

    return _looked_up(emitter, node, ids, make)


def _looked_up(emitter: Emitter, node: fx.Node, ids: Any, make: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """`make` of ids: of `[B, S]` where they are those of the batch."""
    batched = emitter.rows_of(ids, INT64)
    if batched is None:
        return make(emitter.operand(ids, INT64))
    return emitter.joined(make(batched), node.meta["val"].shape[1:])


def _quantized_embedding(emitter: Emitter, node: fx.Node) -> ir.Value:
    codes: Any = argument(node, "codes")
    width: Any = argument(node, "width")
    matrix = _matrix(node, int(codes.meta["val"].shape[0]), int(width))
    by_blocks = emitter.contrib and matrix.block > 0
    make = block_rows if by_blocks else dequantized_rows
    return _looked_up(emitter, node, node.args[0], lambda ids: make(emitter, ids, matrix))


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
