"""Elementwise operators, each as one ONNX node or a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import fx

from ....ir.arguments import argument, argument_names
from ..emitter import DTYPES, Emitter, Lowered, Lowering
from ..graph import BOOL, FLOAT, INT64, MICROSOFT

# ATen name -> ONNX operator of one argument.
UNARY: dict[str, str] = {
    "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "exp": "Exp", "log": "Log",
    "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "erf": "Erf", "floor": "Floor", "ceil": "Ceil",
    "round": "Round", "sign": "Sign", "relu": "Relu", "sigmoid": "Sigmoid", "mish": "Mish",
    "logical_not": "Not", "isnan": "IsNaN", "isinf": "IsInf",
}  # fmt: skip
# ATen name -> ONNX operator of two arguments of one dtype.
BINARY: dict[str, str] = {
    "mul": "Mul", "maximum": "Max", "minimum": "Min", "eq": "Equal", "lt": "Less", "le": "LessOrEqual",
    "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
LOGICAL: dict[str, str] = {
    "logical_and": "And", "logical_or": "Or", "bitwise_and": "And", "bitwise_or": "Or",
}  # fmt: skip


def common_dtype(emitter: Emitter, node: fx.Node) -> ir.DataType:
    """The dtype in which the operands of `node` meet."""
    tensors = [arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node)]
    known = [value.dtype for value in tensors if isinstance(value, torch.Tensor)]
    numbers = [type(arg) for arg in node.args if isinstance(arg, int | float)]
    if any(dtype.is_floating_point for dtype in known) or float in numbers:
        return FLOAT
    return INT64 if any(dtype != torch.bool for dtype in known) or int in numbers else BOOL


def _is_sizes(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], torch.Tensor)


def _unary(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        if emitter.dtype_of(node) == FLOAT:
            return emitter.by_rows(node, node.args[:1], lambda x: emitter.graph.op(kind, *x))
        return emitter.graph.op(kind, emitter.operand(node.args[0], emitter.dtype_of(_first(node))))

    return lower


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _binary(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> Lowered:
        if _is_sizes(node):
            left, right = emitter.size(node.args[0]), emitter.size(node.args[1])
            return sympy.expand(left * right)
        dtype = common_dtype(emitter, node)
        if dtype == FLOAT:
            return emitter.by_rows(node, node.args[:2], lambda pair: emitter.graph.op(kind, *pair))
        return emitter.graph.op(kind, *(emitter.operand(arg, dtype) for arg in node.args[:2]))

    return lower


def _logical(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        if emitter.dtype_of(node) != BOOL:
            pair = (emitter.operand(arg, INT64) for arg in node.args[:2])
            return emitter.graph.op(f"Bitwise{kind}", *pair)
        return emitter.graph.op(kind, *(emitter.operand(arg, BOOL) for arg in node.args[:2]))

    return lower


def _sum(kind: str) -> Callable[[Emitter, fx.Node], ir.Value]:
    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        alpha: Any = argument(node, "alpha")
        dtype = common_dtype(emitter, node)

        def make(pair: tuple[ir.Value, ...]) -> ir.Value:
            left, right = pair
            if alpha != 1:
                right = emitter.graph.op("Mul", right, emitter.graph.number(alpha, dtype))
            return emitter.graph.op(kind, left, right)

        if dtype == FLOAT:
            return emitter.by_rows(node, node.args[:2], make)
        return make(tuple(emitter.operand(arg, dtype) for arg in node.args[:2]))

    return lower


def _rsub(emitter: Emitter, node: fx.Node) -> ir.Value:
    dtype = common_dtype(emitter, node)
    right, left = (emitter.operand(arg, dtype) for arg in node.args[:2])
    return emitter.graph.op("Sub", left, right)


def _ne(emitter: Emitter, node: fx.Node) -> ir.Value:
    dtype = common_dtype(emitter, node)
    pair = (emitter.operand(arg, dtype) for arg in node.args[:2])
    return emitter.graph.op("Not", emitter.graph.op("Equal", *pair))


def _div(emitter: Emitter, node: fx.Node) -> ir.Value:
    mode: Any = node.kwargs.get("rounding_mode")
    if mode is None:
        return emitter.graph.op("Div", *(emitter.operand(arg, FLOAT) for arg in node.args[:2]))
    return _rounded_quotient(emitter, node, str(mode))


def _floor_divide(emitter: Emitter, node: fx.Node) -> ir.Value:
    return _rounded_quotient(emitter, node, "floor")


def _rounded_quotient(emitter: Emitter, node: fx.Node, mode: str) -> ir.Value:
    """Integers exactly: ONNX divides them towards zero; floats by rounding the quotient."""
    graph, dtype = emitter.graph, common_dtype(emitter, node)
    left, right = (emitter.operand(arg, dtype) for arg in node.args[:2])
    if dtype == INT64:
        if mode == "floor":
            left = graph.op("Sub", left, graph.op("Mod", left, right))
        return graph.op("Div", left, right)
    quotient = graph.op("Div", left, right)
    if mode == "floor":
        return graph.op("Floor", quotient)
    return graph.op("Mul", graph.op("Sign", quotient), graph.op("Floor", graph.op("Abs", quotient)))


def _remainder(emitter: Emitter, node: fx.Node) -> ir.Value:
    graph, dtype = emitter.graph, common_dtype(emitter, node)
    left, right = (emitter.operand(arg, dtype) for arg in node.args[:2])
    if dtype == INT64:
        return graph.op("Mod", left, right)
    whole = graph.op("Floor", graph.op("Div", left, right))
    return graph.op("Sub", left, graph.op("Mul", whole, right))


def _pow(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.graph.op("Pow", *(emitter.operand(arg, FLOAT) for arg in node.args[:2]))


def _square(emitter: Emitter, node: fx.Node) -> ir.Value:
    value = emitter.value(node.args[0])
    return emitter.graph.op("Mul", value, value)


def _rsqrt(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.graph.op("Reciprocal", emitter.graph.op("Sqrt", emitter.operand(node.args[0], FLOAT)))


def _expm1(emitter: Emitter, node: fx.Node) -> ir.Value:
    """`Elu` is exp(x) - 1 below zero, and exact there; above, `exp(x) - 1`."""
    graph, value = emitter.graph, emitter.value(node.args[0])
    zero, one = graph.number(0.0), graph.number(1.0)
    above = graph.op("Sub", graph.op("Exp", graph.op("Max", value, zero)), one)
    return graph.op("Add", graph.op("Elu", graph.op("Min", value, zero)), above)


def _log1p(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.graph.op(
        "Log", emitter.graph.op("Add", emitter.value(node.args[0]), emitter.graph.number(1.0))
    )


def silu(emitter: Emitter, value: ir.Value) -> ir.Value:
    """`x * sigmoid(x)`."""
    if emitter.contrib:
        return emitter.graph.op("QuickGelu", value, domain=MICROSOFT, alpha=1.0)
    return emitter.graph.op("Mul", value, emitter.graph.op("Sigmoid", value))


def _silu(emitter: Emitter, node: fx.Node) -> ir.Value:
    return emitter.by_rows(node, node.args[:1], lambda x: silu(emitter, x[0]))


def activation(emitter: Emitter, value: ir.Value, name: str) -> ir.Value:
    """The activation `name` of `ir.ops.activation.ACTIVATIONS`."""
    graph = emitter.graph
    match name:
        case "silu":
            return silu(emitter, value)
        case "gelu":
            return graph.op("Gelu", value)
        case "gelu_tanh":
            return graph.op("Gelu", value, approximate="tanh")
        case "relu":
            return graph.op("Relu", value)
        case "relu2":
            positive = graph.op("Relu", value)
            return graph.op("Mul", positive, positive)
        case "sigmoid":
            return graph.op("Sigmoid", value)
        case "identity":
            return value
        case _:
            raise NotImplementedError(f"activation {name}")


def _gelu(emitter: Emitter, node: fx.Node) -> ir.Value:
    approximate = argument(node, "approximate")
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return emitter.by_rows(node, node.args[:1], lambda x: activation(emitter, x[0], name))


def gated(emitter: Emitter, name: str, gate: ir.Value, up: ir.Value) -> ir.Value:
    """`activation(gate) * up`, the activation by its name."""
    return emitter.graph.op("Mul", activation(emitter, gate, name), up)


def _gated(emitter: Emitter, node: fx.Node) -> ir.Value:
    name: Any = node.args[2]
    return emitter.by_rows(node, node.args[:2], lambda pair: gated(emitter, name, *pair))


def _softcap(emitter: Emitter, node: fx.Node) -> ir.Value:
    cap: Any = node.args[1]
    graph = emitter.graph
    scaled = graph.op("Div", emitter.value(node.args[0]), graph.number(cap))
    return graph.op("Mul", graph.op("Tanh", scaled), graph.number(cap))


def _clamp(low: str, high: str) -> Lowering:
    """Where the bounds stand: as arguments 1 and 2, or only one of them."""

    def lower(emitter: Emitter, node: fx.Node) -> ir.Value:
        given = dict(zip((name for name in (low, high) if name), node.args[1:], strict=False))
        bounds = [node.kwargs.get(name, given.get(name)) for name in ("min", "max")]
        dtype = emitter.dtype_of(node)
        value = emitter.operand(node.args[0], dtype)
        for kind, bound in zip(("Max", "Min"), bounds, strict=True):
            if bound is not None and not (isinstance(bound, float) and math.isinf(bound)):
                value = emitter.graph.op(kind, value, emitter.operand(bound, dtype))
        return value

    return lower


def _where(emitter: Emitter, node: fx.Node) -> ir.Value:
    dtype = emitter.dtype_of(node)
    condition = emitter.operand(node.args[0], BOOL)
    return emitter.graph.op("Where", condition, *(emitter.operand(arg, dtype) for arg in node.args[1:3]))


def _masked_fill(emitter: Emitter, node: fx.Node) -> ir.Value:
    dtype = emitter.dtype_of(node)
    fill, value = emitter.operand(node.args[2], dtype), emitter.operand(node.args[0], dtype)
    return emitter.graph.op("Where", emitter.operand(node.args[1], BOOL), fill, value)


def _bitwise_not(emitter: Emitter, node: fx.Node) -> ir.Value:
    kind = "Not" if emitter.dtype_of(node) == BOOL else "BitwiseNot"
    return emitter.graph.op(kind, emitter.value(node.args[0]))


def _softplus(emitter: Emitter, node: fx.Node) -> ir.Value:
    """`log(1 + exp(beta x)) / beta`, the identity above the threshold: there ONNX's own is exact, too."""
    beta: Any = argument(node, "beta")
    graph, value = emitter.graph, emitter.value(node.args[0])
    if beta == 1:
        return graph.op("Softplus", value)
    return graph.op(
        "Div", graph.op("Softplus", graph.op("Mul", value, graph.number(beta))), graph.number(beta)
    )


def _leaky_relu(emitter: Emitter, node: fx.Node) -> ir.Value:
    slope: Any = argument(node, "negative_slope")
    return emitter.graph.op("LeakyRelu", emitter.value(node.args[0]), alpha=float(slope))


def _constant(emitter: Emitter, node: fx.Node) -> ir.Value:
    """full, zeros, ones and their _like and new_ forms."""
    name = str(node.target).split(".")[1]
    if "full" in name:
        fill: Any = node.args[1]
    elif name == "scalar_tensor":
        fill = node.args[0]
    else:
        fill = 1 if "ones" in name else 0
    value = emitter.operand(fill, DTYPES[node.meta["val"].dtype])
    shape = emitter.shape_of(node)
    return emitter.graph.op("Expand", value, emitter.shape_vector(shape)) if shape else value


def _arange(emitter: Emitter, node: fx.Node) -> ir.Value:
    bounds: tuple[Any, ...] = (0, node.args[0], 1)
    if "start" in str(node.target):
        has_step = "step" in argument_names(node)
        bounds = (*node.args[:2], argument(node, "step") if has_step else 1)
    dtype = emitter.dtype_of(node)
    return emitter.graph.op("Range", *(emitter.operand(bound, dtype) for bound in bounds))


LOWERINGS: dict[str, Lowering] = {
    **{f"aten.{name}": _unary(kind) for name, kind in UNARY.items()},
    **{f"aten.{name}": _binary(kind) for name, kind in BINARY.items()},
    **{f"aten.{name}": _logical(kind) for name, kind in LOGICAL.items()},
    "aten.max.other": _binary("Max"),
    "aten.min.other": _binary("Min"),
    "aten.add": _sum("Add"),
    "aten.sub": _sum("Sub"),
    "aten.rsub": _rsub,
    "aten.ne": _ne,
    "aten.div": _div,
    "aten.floor_divide": _floor_divide,
    "aten.remainder": _remainder,
    "aten.pow": _pow,
    "aten.square": _square,
    "aten.rsqrt": _rsqrt,
    "aten.expm1": _expm1,
    "aten.log1p": _log1p,
    "aten.silu": _silu,
    "aten.gelu": _gelu,
    "aten.clamp": _clamp("min", "max"),
    "aten.clamp_min": _clamp("min", ""),
    "aten.clamp_max": _clamp("", "max"),
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.bitwise_not": _bitwise_not,
    "aten.softplus": _softplus,
    "aten.leaky_relu": _leaky_relu,
    "llmc.gated_activation": _gated,
    "llmc.softcap": _softcap,
    "aten.arange": _arange,
    **dict.fromkeys(
        ("aten.full", "aten.full_like", "aten.zeros", "aten.ones", "aten.zeros_like", "aten.ones_like",
         "aten.new_zeros", "aten.new_ones", "aten.empty", "aten.scalar_tensor"), _constant
    ),
}  # fmt: skip
