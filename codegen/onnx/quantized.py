"""Quantised matrices: MatMulNBits and GatherBlockQuantized, or DequantizeLinear and plain operators."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ...spec.quant import parse_activation
from .emitter import Emitter
from .forms import Parts
from .graph import MICROSOFT

_SMALLEST_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A quantised matrix `[rows, width]` and its stored parts."""

    parts: Parts
    rows: int
    width: int

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return 8 if self.parts.scheme.bits == 8 else 4

    @property
    def block(self) -> int:
        """The group size that a block operator is given; 0 where none fits: blocks are powers of two and at
        least 16, and one scale a row becomes equal scales of as many blocks as divide it."""
        if self.parts.scheme.group_size:
            return self.parts.scheme.group_size
        block = self.width & -self.width
        return block if block >= _SMALLEST_BLOCK else 0

    @property
    def num_blocks(self) -> int:
        """Blocks along a row."""
        return -(-self.width // self.block)


def scales_of(emitter: Emitter, matrix: Matrix, columns: int) -> ir.Value:
    """Scales as float32 `[rows, columns]`."""
    plain = emitter.stored.plain(emitter.graph, matrix.parts.scales)
    if emitter.stored.shape(matrix.parts.scales)[-1] == columns:
        return plain
    return emitter.once(
        ("scales", matrix.parts.scales, columns),
        lambda: emitter.graph.op("Expand", plain, emitter.graph.ints(matrix.rows, columns)),
    )


def block_linear(
    emitter: Emitter, x: ir.Value, matrix: Matrix, bias: ir.Value | None, accuracy: int
) -> ir.Value:
    """`x[..., width] @ matrix.T + bias` by MatMulNBits."""
    graph, block, count = emitter.graph, matrix.block, matrix.num_blocks
    codes = emitter.stored.raw(
        graph,
        matrix.parts.codes,
        dtype=ir.DataType.UINT8,
        shape=(matrix.rows, count, block * matrix.bits // 8),
    )
    return graph.op(
        "MatMulNBits", x, codes, scales_of(emitter, matrix, count), _block_zeros(emitter, matrix), None, bias,
        domain=MICROSOFT, K=matrix.width, N=matrix.rows, bits=matrix.bits, block_size=block,
        accuracy_level=accuracy,
    )  # fmt: skip


def _block_zeros(emitter: Emitter, matrix: Matrix) -> ir.Value | None:
    if matrix.parts.zeros is None:
        return None
    return emitter.stored.raw(emitter.graph, matrix.parts.zeros)


def block_rows(emitter: Emitter, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows of a table by GatherBlockQuantized, padding cut off."""
    graph, block = emitter.graph, matrix.block
    stored = emitter.stored.shape(matrix.parts.codes)
    codes = emitter.stored.raw(graph, matrix.parts.codes, dtype=ir.DataType.UINT8)
    columns = -(-stored[-1] * 8 // matrix.bits // block)
    scales, zeros = scales_of(emitter, matrix, columns), _block_zeros(emitter, matrix)
    out = graph.op(
        "GatherBlockQuantized", codes, ids, scales, zeros,
        domain=MICROSOFT, bits=matrix.bits, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if columns * block == matrix.width:
        return out
    return graph.op("Slice", out, graph.ints(0), graph.ints(matrix.width), graph.ints(-1))


def accuracy_of(activation: str, scheme_group: int) -> int:
    """The accuracy level of MatMulNBits for an activation scheme: 4 multiplies int8 activations, rounded by
    the weights' groups; 1 float32 ones."""
    scheme = parse_activation(activation)
    if scheme is not None and scheme.codes == "int8" and scheme.group_size == scheme_group:
        return 4
    return 1


def dequantized(emitter: Emitter, matrix: Matrix, rows: ir.Value | None = None) -> ir.Value:
    """The matrix (or its rows `rows`) as float32 `[rows, width]` by DequantizeLinear."""
    graph, scheme = emitter.graph, matrix.parts.scheme
    groups = emitter.stored.shape(matrix.parts.scales)[-1]
    signed = matrix.parts.zeros is None
    stored = emitter.stored.shape(matrix.parts.codes)[-1] * 8 // matrix.bits
    dtype = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4,
             (8, True): ir.DataType.INT8, (8, False): ir.DataType.UINT8}[matrix.bits, signed]  # fmt: skip
    codes = emitter.stored.raw(graph, matrix.parts.codes, dtype=dtype, shape=(matrix.rows, stored))
    scales = emitter.stored.plain(graph, matrix.parts.scales)
    zeros = None
    if matrix.parts.zeros is not None:
        zero_dtype = ir.DataType.UINT4 if matrix.bits == 4 else ir.DataType.UINT8
        zeros = emitter.stored.raw(graph, matrix.parts.zeros, dtype=zero_dtype, shape=(matrix.rows, groups))
    if rows is not None:
        codes, scales = (graph.op("Gather", part, rows, axis=0) for part in (codes, scales))
        zeros = None if zeros is None else graph.op("Gather", zeros, rows, axis=0)
    size = scheme.group_size or stored
    wide = graph.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=size)
    if stored == matrix.width:
        return wide
    return graph.op("Slice", wide, graph.ints(0), graph.ints(matrix.width), graph.ints(1))
