"""Quantised matrices: MatMulNBits and GatherBlockQuantized, or DequantizeLinear and plain operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import sympy

from ...spec.quant import ActivationScheme, parse_activation
from .emitter import Emitter
from .forms import Parts, block_of
from .graph import FLOAT, MICROSOFT

# As `ir.rounded`: groups whose largest magnitude is below this are zero.
_SMALLEST_INPUT = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A quantised matrix `[rows, width]` and its stored parts: all that they hold, or their rows `span`."""

    parts: Parts
    rows: int
    width: int
    span: range | None = None

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return 8 if self.parts.scheme.bits == 8 else 4

    @property
    def block(self) -> int:
        """As `block_of`."""
        return block_of(self.parts.scheme, self.width)

    @property
    def num_blocks(self) -> int:
        """Blocks along a row."""
        return -(-self.width // self.block)

    def halves(self) -> tuple[Matrix, Matrix]:
        """Its first and its second half of rows."""
        middle = self.rows // 2
        first, second = range(middle), range(middle, self.rows)
        return replace(self, rows=middle, span=first), replace(self, rows=len(second), span=second)


def scales_of(emitter: Emitter, matrix: Matrix, columns: int) -> ir.Value:
    """Scales as float32 `[rows, columns]`."""
    plain = emitter.stored.plain(emitter.graph, matrix.parts.scales, matrix.span)
    if emitter.stored.shape(matrix.parts.scales)[-1] == columns:
        return plain
    return emitter.once(
        ("scales", matrix.parts.scales, columns, matrix.span),
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
        rows=matrix.span,
    )
    return graph.op(
        "MatMulNBits", x, codes, scales_of(emitter, matrix, count), _block_zeros(emitter, matrix), None, bias,
        domain=MICROSOFT, K=matrix.width, N=matrix.rows, bits=matrix.bits, block_size=block,
        accuracy_level=accuracy,
    )  # fmt: skip


def _block_zeros(emitter: Emitter, matrix: Matrix) -> ir.Value | None:
    if matrix.parts.zeros is None:
        return None
    return emitter.stored.raw(emitter.graph, matrix.parts.zeros, rows=matrix.span)


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


def rounds_itself(activation: str, matrix: Matrix) -> bool:
    """Whether MatMulNBits, at accuracy level 4, rounds its input as `activation` says: to int8, in the blocks
    of the weights."""
    scheme = parse_activation(activation)
    return (
        scheme is not None and scheme.codes == "int8" and (scheme.group_size or matrix.width) == matrix.block
    )


def rounded(emitter: Emitter, x: ir.Value, width: int, activation: str, scale: ir.Value | None) -> ir.Value:
    """`x[..., width]` rounded to codes of an activation scheme and back, as `ir.rounded` does."""
    scheme = parse_activation(activation)
    if scheme is None:
        return x
    graph, top = emitter.graph, emitter.graph.number(scheme.top)
    if scale is not None:
        return graph.op("Mul", _coded(emitter, graph.op("Div", x, scale), scheme), scale)
    size = scheme.group_size or width
    missing = -width % size
    if missing:
        x = graph.op("Pad", x, graph.ints(0, missing), graph.number(0.0), graph.ints(-1))
    groups = graph.op("Reshape", x, graph.ints(-1, (width + missing) // size, size))
    largest = graph.op("ReduceMax", graph.op("Abs", groups), graph.ints(-1), keepdims=1)
    tiny = graph.op("Less", largest, graph.number(_SMALLEST_INPUT))
    factor = graph.op("Where", tiny, graph.number(0.0), graph.op("Div", top, largest))
    back = graph.op("Where", tiny, graph.number(0.0), graph.op("Div", largest, top))
    values = graph.op("Mul", _coded(emitter, graph.op("Mul", groups, factor), scheme), back)
    flat = graph.op("Reshape", values, graph.ints(-1, width + missing))
    return graph.op("Slice", flat, graph.ints(0), graph.ints(width), graph.ints(1)) if missing else flat


def _coded(emitter: Emitter, scaled: ir.Value, scheme: ActivationScheme) -> ir.Value:
    graph = emitter.graph
    if scheme.codes != "fp8":
        return graph.op("Round", scaled)
    top = graph.number(scheme.top)
    clamped = graph.op("Min", graph.op("Max", scaled, graph.number(-scheme.top)), top)
    return graph.cast(graph.cast(clamped, ir.DataType.FLOAT8E4M3FN), FLOAT)


def dequantized(emitter: Emitter, matrix: Matrix, rows: ir.Value | None = None) -> ir.Value:
    """The matrix (or its rows `rows`) as float32 `[rows, width]` by DequantizeLinear, which takes
    symmetric codes signed: no block operator reads this matrix."""
    graph, scheme = emitter.graph, matrix.parts.scheme
    groups = emitter.stored.shape(matrix.parts.scales)[-1]
    signed = matrix.parts.zeros is None
    stored = emitter.stored.shape(matrix.parts.codes)[-1] * 8 // matrix.bits
    dtype = {(4, True): ir.DataType.INT4, (4, False): ir.DataType.UINT4,
             (8, True): ir.DataType.INT8, (8, False): ir.DataType.UINT8}[matrix.bits, signed]  # fmt: skip
    codes = emitter.stored.raw(graph, matrix.parts.codes, dtype=dtype, shape=(matrix.rows, stored))
    scales = emitter.reshape(
        emitter.stored.plain(graph, matrix.parts.scales), (sympy.Integer(matrix.rows), sympy.Integer(groups))
    )
    zeros = None
    if matrix.parts.zeros is not None:
        zeros = emitter.stored.raw(graph, matrix.parts.zeros, shape=(matrix.rows, groups))
        zeros = graph.cached_cast(zeros, dtype) if matrix.bits == 4 else zeros
    if rows is not None:
        codes, scales = (graph.op("Gather", part, rows, axis=0) for part in (codes, scales))
        zeros = None if zeros is None else graph.op("Gather", zeros, rows, axis=0)
    size = scheme.group_size or stored
    wide = graph.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=size)
    if stored == matrix.width:
        return wide
    return graph.op("Slice", wide, graph.ints(0), graph.ints(matrix.width), graph.ints(1))


def expert_matrix(emitter: Emitter, parts: Parts, index: ir.Value, width: int) -> ir.Value:
    """Expert `index` of the stack `[E, rows, width]` as float32 `[rows, width]`, in standard operators;
    the stack stays as it is stored. Nibbles are without a sign, bytes with one unless there are zeros."""
    graph, scheme = emitter.graph, parts.scheme
    codes = graph.op("Gather", emitter.stored.raw(graph, parts.codes), index, axis=0)
    scales = graph.op("Gather", emitter.stored.plain(graph, parts.scales), index, axis=0)
    zeros = None
    if parts.zeros is not None:
        zeros = graph.op("Gather", emitter.stored.raw(graph, parts.zeros), index, axis=0)
    _, rows, stored = emitter.stored.shape(parts.codes)
    if scheme.bits != 8:
        stored *= 2
        low = graph.op("BitwiseAnd", codes, graph.constant(np.asarray(15, np.uint8)))
        high = graph.op("BitShift", codes, graph.constant(np.asarray(4, np.uint8)), direction="RIGHT")
        pairs = [graph.op("Unsqueeze", half, graph.ints(2)) for half in (low, high)]
        codes = graph.reshape(graph.op("Concat", *pairs, axis=2), graph.ints(rows, stored))
        if zeros is None:
            middle = graph.constant(np.asarray(8, np.uint8))
            zeros = graph.op("Expand", middle, graph.op("Shape", scales))
    size = scheme.group_size or stored
    wide = graph.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=size)
    if stored == width:
        return wide
    return graph.op("Slice", wide, graph.ints(0), graph.ints(width), graph.ints(1))
