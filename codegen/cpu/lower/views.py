"""Operators that only look at a buffer differently: they emit no code unless a copy is unavoidable."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from ..emitter import Emitter, Lowering
from ..value import C_TYPES, Size, Value


def _same(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    if C_TYPES[node.meta["val"].dtype] == value.ctype:
        return value
    return cast(emitter, node)


def cast(emitter: Emitter, node: fx.Node) -> Value:
    """A change of element type; between float types nothing happens, since all are float32 here."""
    value, ctype = emitter.value(node.args[0]), C_TYPES[node.meta["val"].dtype]
    if ctype == value.ctype:
        return value
    out = emitter.output(node)
    emitter.loop(emitter.comment(node), out, [value], "({0} != 0)" if ctype == "uint8_t" else "{0}")
    return out


def _reshape(emitter: Emitter, node: fx.Node) -> Value:
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    return emitter.reshaped(emitter.value(node.args[0]), shape, node)


def _permute(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    dims: Any = node.args[1]
    order = [dim % len(value.shape) for dim in dims]
    return value.viewed(tuple(value.shape[d] for d in order), tuple(value.strides[d] for d in order))


def _transpose(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    shape, strides = list(value.shape), list(value.strides)
    first, second = (_dim(arg, value) for arg in node.args[1:3])
    shape[first], shape[second] = shape[second], shape[first]
    strides[first], strides[second] = strides[second], strides[first]
    return value.viewed(tuple(shape), tuple(strides))


def _unsqueeze(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    dim: Any = node.args[1]
    dim = dim % (len(value.shape) + 1)
    shape, strides = list(value.shape), list(value.strides)
    shape.insert(dim, sympy.Integer(1))
    strides.insert(dim, sympy.Integer(0))
    return value.viewed(tuple(shape), tuple(strides))


def _squeeze(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    asked: Any = node.args[1] if len(node.args) > 1 else list(range(len(value.shape)))
    dims = [asked] if isinstance(asked, int) else asked
    gone = {dim % len(value.shape) for dim in dims if value.shape[dim] == 1}
    kept = [dim for dim in range(len(value.shape)) if dim not in gone]
    return value.viewed(tuple(value.shape[d] for d in kept), tuple(value.strides[d] for d in kept))


def _expand(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    missing = len(shape) - len(value.shape)
    zero = sympy.Integer(0)
    strides = [
        zero if size == 1 and want != 1 else stride
        for size, stride, want in zip(value.shape, value.strides, shape[missing:], strict=True)
    ]
    return value.viewed(shape, (*([zero] * missing), *strides))


def _select(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    dim, index = _dim(node.args[1], value), emitter.size(node.args[2])
    index = index + value.shape[dim] if index.is_negative else index
    shape = value.shape[:dim] + value.shape[dim + 1 :]
    strides = value.strides[:dim] + value.strides[dim + 1 :]
    return value.viewed(shape, strides, index * value.strides[dim])


def _slice(emitter: Emitter, node: fx.Node) -> Value:
    value = emitter.value(node.args[0])
    args: list[Any] = [*node.args[1:], *([None] * (5 - len(node.args)))]
    dim = _dim(args[0] or 0, value)
    step = args[3] or 1
    start = emitter.size(args[1] or 0)
    start = start + value.shape[dim] if start.is_negative else start
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    strides = list(value.strides)
    strides[dim] = strides[dim] * step
    return value.viewed(shape, tuple(strides), start * value.strides[dim])


def _split(emitter: Emitter, node: fx.Node) -> tuple[Value, ...]:
    value = emitter.value(node.args[0])
    asked: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim = _dim(asked, value)
    parts: list[Value] = []
    start: Size = sympy.Integer(0)
    for part in node.meta["val"]:
        shape = emitter.symbols.sizes(part.shape)
        parts.append(value.viewed(shape, value.strides, start * value.strides[dim]))
        start = start + shape[dim]
    return tuple(parts)


def _unbind(emitter: Emitter, node: fx.Node) -> tuple[Value, ...]:
    value = emitter.value(node.args[0])
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, value)
    shape = value.shape[:dim] + value.shape[dim + 1 :]
    strides = value.strides[:dim] + value.strides[dim + 1 :]
    return tuple(
        value.viewed(shape, strides, index * value.strides[dim]) for index in range(len(node.meta["val"]))
    )


def _getitem(emitter: Emitter, node: fx.Node) -> Any:
    source: Any = node.args[0]
    index: Any = node.args[1]
    whole: Any = emitter.env[source]
    return whole[index]


def _sym_size(emitter: Emitter, node: fx.Node) -> Size:
    return emitter.value(node.args[0]).shape[int(str(node.args[1]))]


def _dim(arg: Any, value: Value) -> int:
    return int(arg) % len(value.shape)


def _arithmetic(emitter: Emitter, node: fx.Node) -> Size:
    left, right = (emitter.size(arg) for arg in node.args)
    operation = {"add": left + right, "sub": left - right, "mul": left * right}
    return sympy.expand(operation[str(getattr(node.target, "__name__", ""))])


LOWERINGS: dict[str, Lowering] = {
    **dict.fromkeys(("aten.view", "aten.reshape", "aten.flatten", "aten.unflatten"), _reshape),
    **dict.fromkeys(("aten.alias", "aten.detach", "aten.contiguous", "aten.clone"), _same),
    **dict.fromkeys(("aten.lift_fresh_copy", "aten.to", "aten._to_copy", "aten.type_as", "aten.copy"), cast),
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.unsqueeze": _unsqueeze,
    "aten.squeeze": _squeeze,
    "aten.expand": _expand,
    "aten.select": _select,
    "aten.slice": _slice,
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk"), _split),
    "aten.unbind": _unbind,
    "operator.getitem": _getitem,
    "aten.sym_size": _sym_size,
    **dict.fromkeys(("operator.add", "operator.sub", "operator.mul"), _arithmetic),
}  # fmt: skip
