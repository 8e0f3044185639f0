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
from .elementwise import gated

Half = Callable[[ir.Value], ir.Value]


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
    matrix = _factor(node)
    bias = emitter.optional(argument(node, "bias"))
    accuracy = _accuracy(emitter, node, matrix)
    if accuracy:
        return emitter.by_rows(
            node, node.args[:1], lambda rows: block_linear(emitter, rows[0], matrix, bias, accuracy)
        )
    scale = emitter.optional(argument(node, "activation_scale"))
    activation = _activation(emitter, node, matrix)
    x = rounded(emitter, emitter.operand(source, FLOAT), matrix.width, activation, scale)
    if emitter.contrib and matrix.block > 0:
        return block_linear(emitter, x, matrix, bias, accuracy=1)
    return product(emitter, node, x, _dequantized(emitter, matrix), bias)


def _activation(emitter: Emitter, node: fx.Node, matrix: Matrix) -> str:
    """How the input of a product is rounded."""
    return str(argument(node, "activation")) or emitter.activations.get(matrix.parts.codes, "")


def _accuracy(emitter: Emitter, node: fx.Node, matrix: Matrix) -> int:
    """The accuracy level at which MatMulNBits is the whole of a product, or 0 where it is not."""
    activation = _activation(emitter, node, matrix)
    if not (emitter.contrib and matrix.block > 0):
        return 0
    return 4 if rounds_itself(activation, matrix) else 0 if activation else 1


def _gated_packed(emitter: Emitter, node: fx.Node) -> ir.Value:
    """Each half of what is packed as a product of its own where it can be: taking one result apart copies it,
    which is a fiftieth of a decoded token."""
    packed: Any = node.args[0]
    name: Any = node.args[1]
    halves = _halves(emitter, packed)

    def parted(rows: tuple[ir.Value, ...]) -> ir.Value:
        return gated(emitter, name, *emitter.graph.ops("Split", rows, 2, axis=-1, num_outputs=2))

    if halves is None:
        return emitter.by_rows(node, (packed,), parted)
    first, second = halves
    return emitter.by_rows(
        node, packed.args[:1], lambda rows: gated(emitter, name, first(rows[0]), second(rows[0]))
    )


def _halves(emitter: Emitter, packed: fx.Node) -> tuple[Half, Half] | None:
    """What makes of its input the first and the second half of a packed product that nobody else reads."""
    if str(packed.target) != "llmc.quantized_linear.default" or len(packed.users) > 1:
        return None
    matrix = _factor(packed)
    accuracy = _accuracy(emitter, packed, matrix)
    bias: Any = argument(packed, "bias")
    if not accuracy:
        return None

    def product_of(half: Matrix) -> Half:
        added = None if bias is None else emitter.stored.plain(emitter.graph, str(bias.target), half.span)
        return lambda x: block_linear(emitter, x, half, added, accuracy)

    first, second = matrix.halves()
    return product_of(first), product_of(second)


def _factor(node: fx.Node) -> Matrix:
    """The matrix that a product multiplies by."""
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
    "llmc.gated_activation_packed": _gated_packed,
    "llmc.embedding": _embedding,
    "aten.embedding": _embedding,
    "llmc.quantized_embedding": _quantized_embedding,
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm"), _matmul),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm"), _addmm),
}
