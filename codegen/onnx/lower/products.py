"""Matrix products and table look-ups, plain and quantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProduct:
    """A quantised product that MatMulNBits computes, its input rounded as `accuracy` says."""

    matrix: Matrix
    bias: str | None
    accuracy: int

    def columns(self, emitter: Emitter, x: ir.Value, which: range) -> ir.Value:
        """The columns `which` of the product with `x`, the weights' rows read where they lie."""
        of = None if len(which) == self.matrix.rows else which
        bias = None if self.bias is None else emitter.stored.plain(emitter.graph, self.bias, of)
        return block_linear(emitter, x, replace(self.matrix, rows=len(which), of=of), bias, self.accuracy)


def block_product(emitter: Emitter, node: fx.Node) -> BlockProduct | None:
    """How MatMulNBits computes `node`; None where that is no such product, or its input is rounded as the
    operator does not."""
    if str(node.target) != "llmc.quantized_linear.default":
        return None
    matrix, activation = _matrix_of(node), _activation_of(emitter, node)
    fits = emitter.contrib and matrix.block > 0 and (not activation or rounds_itself(activation, matrix))
    bias = argument(node, "bias")
    if not fits:
        return None
    return BlockProduct(
        matrix=matrix, bias=None if bias is None else str(bias.target), accuracy=4 if activation else 1
    )


def _quantized_linear(emitter: Emitter, node: fx.Node) -> ir.Value:
    block = block_product(emitter, node)
    if block is not None:
        every = range(block.matrix.rows)
        return emitter.by_rows(node, node.args[:1], lambda rows: block.columns(emitter, rows[0], every))
    matrix, bias = _matrix_of(node), emitter.optional(argument(node, "bias"))
    scale = emitter.optional(argument(node, "activation_scale"))
    x = emitter.operand(node.args[0], FLOAT)
    x = rounded(emitter, x, matrix.width, _activation_of(emitter, node), scale)
    if emitter.contrib and matrix.block:
        return block_linear(emitter, x, matrix, bias, accuracy=1)
    return product(emitter, node, x, _dequantized(emitter, matrix), bias)


def _activation_of(emitter: Emitter, node: fx.Node) -> str:
    """How the input of a quantised product is rounded."""
    codes: Any = argument(node, "codes")
    return str(argument(node, "activation")) or emitter.activations.get(str(codes.target), "")


def _matrix_of(node: fx.Node) -> Matrix:
    source: Any = node.args[0]
    return _matrix(node, int(node.meta["val"].shape[-1]), int(source.meta["val"].shape[-1]))


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
