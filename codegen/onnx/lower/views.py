"""Shapes, slices and joins: what moves values and computes none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
from torch import fx

from ....ir.arguments import argument
from ..emitter import Emitter, Lowered, Lowering
from ..graph import BOOL

_END = 2**62


def _same(emitter: Emitter, node: fx.Node) -> Lowered:
    return emitter.lowered(node.args[0])


def _to_copy(emitter: Emitter, node: fx.Node) -> ir.Value:
    source: Any = node.args[0]
    value = emitter.value(source)
    wanted = emitter.dtype_of(node)
    if emitter.dtype_of(source) == wanted:
        return value
    return emitter.graph.cast(value, wanted)


def _reshape(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.reshape(emitter.value(node.args[0]), emitter.shape_of(node))


def _dims(emitter: Emitter, arg: Any) -> int:
    return len(arg.meta["val"].shape)


def _permute(emitter: Emitter, node: fx.Node) -> ir.Value:
    order: Any = node.args[1]
    rank = _dims(emitter, node.args[0])
    return emitter.graph.op("Transpose", emitter.value(node.args[0]), perm=[dim % rank for dim in order])


def _transpose(emitter: Emitter, node: fx.Node) -> ir.Value:
    rank = _dims(emitter, node.args[0])
    order = list(range(rank))
    first, second = (int(dim) % rank for dim in node.args[1:3])  # pyright: ignore[reportArgumentType]
    order[first], order[second] = second, first
    return emitter.graph.op("Transpose", emitter.value(node.args[0]), perm=order)


def _expand(emitter: Emitter, node: fx.Node) -> ir.Value:
    value = emitter.value(node.args[0])
    return emitter.graph.op("Expand", value, emitter.shape_vector(emitter.shape_of(node)))


def _repeat(emitter: Emitter, node: fx.Node) -> ir.Value:
    """Tiles: as many leading dimensions as there are counts."""
    counts: Any = node.args[1]
    source: Any = node.args[0]
    shape = emitter.shape_of(source)
    padded = (*([sympy.Integer(1)] * (len(counts) - len(shape))), *shape)
    value = emitter.reshape(emitter.value(source), padded)
    return emitter.graph.op("Tile", value, emitter.shape_vector(emitter.sizes(counts)))


def _bound(emitter: Emitter, arg: Any, default: int) -> ir.Value:
    if arg is None:
        return emitter.graph.ints(default)
    if isinstance(arg, int):
        return emitter.graph.ints(min(arg, _END))
    return emitter.scalar(emitter.size(arg))


def _arguments(node: fx.Node, count: int) -> list[Any]:
    return [*node.args, *([None] * (count - len(node.args)))]


def _slice(emitter: Emitter, node: fx.Node) -> ir.Value:
    source, dim, start, stop, step = _arguments(node, 5)
    parts = _parts_of(source)
    if node in parts:
        outputs = emitter.once(("split", source), lambda: _split_into(emitter, source, parts))
        return outputs[parts.index(node)]
    axes = emitter.graph.ints((dim or 0) % _dims(emitter, source))
    low, high = _bound(emitter, start, 0), _bound(emitter, stop, _END)
    return emitter.graph.op("Slice", emitter.value(source), low, high, axes, emitter.graph.ints(step or 1))


def _parts_of(source: fx.Node) -> list[fx.Node]:
    """The slices that cut `source` along its last dimension into consecutive parts without a rest, in order;
    none when there are no such."""
    rank = len(source.meta["val"].shape)
    width = source.meta["val"].shape[-1]
    bounds: dict[int, tuple[int, fx.Node]] = {}
    for user in source.users:
        if str(user.target) != "aten.slice.Tensor" or len(user.args) != 4 or not isinstance(width, int):
            continue
        dim, start, stop = user.args[1:]
        if all(isinstance(bound, int) for bound in (dim, start, stop)) and int(dim) % rank == rank - 1:  # pyright: ignore[reportArgumentType]
            bounds[int(start)] = (min(int(stop), width), user)  # pyright: ignore[reportArgumentType]
    parts: list[fx.Node] = []
    at = 0
    while at in bounds:
        at, part = bounds[at][0], bounds[at][1]
        parts.append(part)
        if at == width:
            return parts if len(parts) > 1 else []
    return []


def _split_into(emitter: Emitter, source: fx.Node, parts: Sequence[fx.Node]) -> tuple[ir.Value, ...]:
    widths = [int(part.meta["val"].shape[-1]) for part in parts]
    batched = emitter.rows_of(source)
    value = emitter.value(source) if batched is None else batched
    outputs = emitter.graph.ops("Split", (value, emitter.graph.ints(*widths)), len(parts), axis=-1)
    if batched is None:
        return outputs
    leading = [int(dim) for dim in source.meta["val"].shape[1:-1]]
    return tuple(emitter.joined(out, (*leading, width)) for out, width in zip(outputs, widths, strict=True))


def _split(emitter: Emitter, node: fx.Node) -> tuple[Any, ...]:
    """split, split_with_sizes and chunk: the sizes are those of the results."""
    results = node.meta["val"]
    dim: Any = argument(node, "dim")
    value = emitter.value(node.args[0])
    if len(results) == 1:
        return (value,)
    sizes = emitter.shape_vector([emitter.size(result.shape[dim]) for result in results])
    return emitter.graph.ops("Split", (value, sizes), len(results), axis=dim)


def _unbind(emitter: Emitter, node: fx.Node) -> tuple[Any, ...]:
    dim: Any = argument(node, "dim")
    value, graph = emitter.value(node.args[0]), emitter.graph
    count = len(node.meta["val"])
    return tuple(
        graph.op("Gather", value, graph.number(i, ir.DataType.INT64), axis=dim) for i in range(count)
    )


def _select(emitter: Emitter, node: fx.Node) -> ir.Value:
    source, dim, index = _arguments(node, 3)
    graph = emitter.graph
    at = graph.number(index, ir.DataType.INT64) if isinstance(index, int) else graph.op(
        "Squeeze", emitter.scalar(emitter.size(index))
    )  # fmt: skip
    return graph.op("Gather", emitter.value(source), at, axis=dim)


def _cat(emitter: Emitter, node: fx.Node) -> ir.Value:
    sources: Any = node.args[0]
    dim: Any = argument(node, "dim")
    kept = [source for source in sources if tuple(source.meta["val"].shape) != (0,)]
    wanted = emitter.dtype_of(node)
    return emitter.graph.op("Concat", *(emitter.operand(source, wanted) for source in kept), axis=dim)


def _stack(emitter: Emitter, node: fx.Node) -> ir.Value:
    sources: Any = node.args[0]
    asked: Any = argument(node, "dim")
    dim = asked % len(node.meta["val"].shape)
    axes = emitter.graph.ints(dim)
    wide = [emitter.graph.op("Unsqueeze", emitter.value(source), axes) for source in sources]
    return emitter.graph.op("Concat", *wide, axis=dim)


def _flip(emitter: Emitter, node: fx.Node) -> ir.Value:
    dims: Any = node.args[1]
    rank = _dims(emitter, node.args[0])
    count = len(dims)
    ints = emitter.graph.ints
    bounds = (ints(*[-1] * count), ints(*[-_END] * count), ints(*(dim % rank for dim in dims)))
    return emitter.graph.op("Slice", emitter.value(node.args[0]), *bounds, ints(*[-1] * count))


def _pad(emitter: Emitter, node: fx.Node) -> ir.Value:
    """constant_pad_nd: pairs (before, after) from the last dimension on."""
    pads: Any = node.args[1]
    fill: Any = argument(node, "value")
    count = len(pads) // 2
    rank = _dims(emitter, node.args[0])
    before = [pads[2 * index] for index in reversed(range(count))]
    after = [pads[2 * index + 1] for index in reversed(range(count))]
    axes = emitter.graph.ints(*range(rank - count, rank))
    wanted = emitter.graph.number(fill, emitter.dtype_of(node))
    return emitter.graph.op(
        "Pad", emitter.value(node.args[0]), emitter.graph.ints(*before, *after), wanted, axes
    )


def _triangle(upper: int) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        diagonal: Any = argument(node, "diagonal")
        value = emitter.value(node.args[0])
        k = emitter.graph.number(diagonal, ir.DataType.INT64)
        if emitter.dtype_of(node) != BOOL:
            return emitter.graph.op("Trilu", value, k, upper=upper)
        wide = emitter.graph.cast(value, ir.DataType.INT64)
        return emitter.graph.cast(emitter.graph.op("Trilu", wide, k, upper=upper), BOOL)

    return lower


def _getitem(emitter: Emitter, node: fx.Node) -> Lowered:
    index: Any = node.args[1]
    found = emitter.lowered(node.args[0])
    assert isinstance(found, tuple)
    return found[index]


def _sym_size(emitter: Emitter, node: fx.Node) -> sympy.Expr:
    source: Any = node.args[0]
    index: Any = node.args[1]
    return emitter.size(source.meta["val"].shape[index])


def _sym_numel(emitter: Emitter, node: fx.Node) -> sympy.Expr:
    source: Any = node.args[0]
    return sympy.expand(sympy.prod(emitter.shape_of(source)))


def _arithmetic(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> sympy.Expr:
        left, right = (emitter.size(arg) for arg in node.args)
        table = {
            "add": lambda: left + right,
            "sub": lambda: left - right,
            "mul": lambda: left * right,
            "floordiv": lambda: sympy.floor(left / right),
            "mod": lambda: sympy.Mod(left, right),
        }
        return sympy.expand(table[kind]())

    return lower


LOWERINGS: dict[str, Lowering] = {
    **dict.fromkeys(
        ("aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh_copy"), _same
    ),
    **dict.fromkeys(("aten._to_copy", "aten.to", "aten.type_as"), _to_copy),
    **dict.fromkeys(
        ("aten.reshape", "aten.view", "aten.view_copy", "aten.flatten", "aten.unflatten", "aten.unsqueeze",
         "aten.squeeze"), _reshape
    ),
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.expand": _expand,
    **dict.fromkeys(("aten.repeat", "aten.tile"), _repeat),
    "aten.slice": _slice,
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk"), _split),
    "aten.unbind": _unbind,
    "aten.select": _select,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.flip": _flip,
    "aten.constant_pad_nd": _pad,
    "aten.tril": _triangle(0),
    "aten.triu": _triangle(1),
    "operator.getitem": _getitem,
    "aten.sym_size": _sym_size,
    "aten.sym_numel": _sym_numel,
    **{f"operator.{name}": _arithmetic(name) for name in ("add", "sub", "mul", "floordiv", "mod")},
}  # fmt: skip
