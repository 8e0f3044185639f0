"""Rotary embedding: angles once a step, one operator for each of q and k."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy
from torch import fx

from ..emitter import Emitter, Lowering
from ..graph import FLOAT, MICROSOFT


def _tables(emitter: Emitter, positions: Any, inv_freq: Any, scale: float) -> tuple[ir.Value, ir.Value]:
    """cos and sin of every token's angles, `[T, R / 2]`."""

    def make() -> tuple[ir.Value, ir.Value]:
        return _cos_and_sin(emitter, emitter.graph.cast(emitter.value(positions), FLOAT), inv_freq, scale)

    return emitter.once(("rope", positions, inv_freq, scale), make)


def position_tables(emitter: Emitter, inv_freq: fx.Node, scale: float) -> tuple[ir.Value, ir.Value]:
    """cos and sin of the angles at every position of the longest context, and at one behind it, where a batch
    may have a token that nobody reads: `[N + 1, R / 2]`. Of constants, so that loading computes them once."""

    def make() -> tuple[ir.Value, ir.Value]:
        graph = emitter.graph
        end = float(emitter.program.spec.max_context + 1)
        scope, graph.scope = graph.scope, "rope"
        every = graph.op("Range", *(graph.number(bound) for bound in (0.0, end, 1.0)))
        graph.scope = scope
        return _cos_and_sin(emitter, every, inv_freq, scale)

    return emitter.once(("rope table", inv_freq.target, scale), make)


def _cos_and_sin(
    emitter: Emitter, positions: ir.Value, inv_freq: Any, scale: float
) -> tuple[ir.Value, ir.Value]:
    """cos and sin, times `scale`, of `positions[n] * inv_freq[R / 2]`."""
    graph = emitter.graph
    scope, graph.scope = graph.scope, "rope"
    angles = graph.op("Mul", graph.op("Unsqueeze", positions, graph.ints(1)), emitter.value(inv_freq))
    cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
    if scale != 1.0:
        cos, sin = (graph.op("Mul", table, graph.number(scale)) for table in (cos, sin))
    graph.scope = scope
    return cos, sin


def _rope(emitter: Emitter, node: fx.Node) -> ir.Value:
    x, positions, inv_freq, scale, style, tail = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(inv_freq, fx.Node)
    heads, width = (int(dim) for dim in x.meta["val"].shape[1:])
    rotated = 2 * int(inv_freq.meta["val"].shape[0])
    cos, sin = _tables(emitter, positions, inv_freq, float(scale))  # pyright: ignore[reportArgumentType]
    value, graph = emitter.value(x), emitter.graph
    if rotated == width:
        return _rotate(emitter, value, heads, width, rotated, cos, sin, str(style))
    if not tail and style != "interleaved_to_half":
        return _rotate(emitter, value, heads, width, rotated, cos, sin, str(style))
    rest = width - rotated
    sizes = graph.ints(*((rest, rotated) if tail else (rotated, rest)))
    first, second = graph.ops("Split", (value, sizes), 2, axis=-1)
    if tail:
        second = _rotate(emitter, second, heads, rotated, rotated, cos, sin, str(style))
    else:
        first = _rotate(emitter, first, heads, rotated, rotated, cos, sin, str(style))
    return graph.op("Concat", first, second, axis=-1)


def _rotate(
    emitter: Emitter,
    value: ir.Value,
    heads: int,
    width: int,
    rotated: int,
    cos: ir.Value,
    sin: ir.Value,
    style: str,
) -> ir.Value:
    """Rotate the first `rotated` elements of `value[T, heads, width]`."""
    graph = emitter.graph
    if style == "interleaved_to_half":
        pairs = graph.reshape(value, graph.ints(-1, heads, rotated // 2, 2))
        value = graph.op("Transpose", pairs, perm=[0, 1, 3, 2])
    flat = graph.reshape(value, graph.ints(1, -1, heads * width))
    options: dict[str, Any] = {
        "interleaved": int(style == "interleaved"),
        "num_heads": heads,
        "rotary_embedding_dim": rotated if rotated < width else None,
    }
    if emitter.contrib:
        offset = graph.ints(0)
        out = graph.op("RotaryEmbedding", flat, offset, cos, sin, domain=MICROSOFT, **options)
    else:
        axes = graph.ints(0)
        batch = emitter.once(
            ("rope batch", cos), lambda: tuple(graph.op("Unsqueeze", table, axes) for table in (cos, sin))
        )
        out = graph.op("RotaryEmbedding", flat, *batch, **options)
    return emitter.reshape(out, (sympy.Symbol("T"), sympy.Integer(heads), sympy.Integer(width)))


LOWERINGS: dict[str, Lowering] = {"llmc.rope": _rope}
