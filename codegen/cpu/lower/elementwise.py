"""Elementwise operators as one generated loop each, by an expression over their operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from ..emitter import Emitter, Lowering
from ..value import Value, c_size

# Expressions over float (or integer) operands {0}, {1}, ...; functions are those of ops.hpp.
UNARY: dict[str, str] = {
    "neg": "-{0}",
    "abs": "({0} < 0 ? -{0} : {0})",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1.0f / std::sqrt({0})",
    "reciprocal": "1.0f / {0}",
    "exp": "std::exp({0})",
    "expm1": "std::expm1({0})",
    "log": "std::log({0})",
    "log1p": "std::log1p({0})",
    "sin": "std::sin({0})",
    "cos": "std::cos({0})",
    "tanh": "std::tanh({0})",
    "erf": "std::erf({0})",
    "floor": "std::floor({0})",
    "ceil": "std::ceil({0})",
    "round": "std::nearbyint({0})",
    "sign": "(({0} > 0) - ({0} < 0))",
    "relu": "({0} > 0 ? {0} : 0)",
    "square": "{0} * {0}",
    "sigmoid": "1.0f / (1.0f + std::exp(-{0}))",
    "silu": "{0} / (1.0f + std::exp(-{0}))",
    "mish": "{0} * std::tanh(std::log1p(std::exp({0})))",
    "logical_not": "!{0}",
    "bitwise_not": "!{0}",
    "isnan": "std::isnan({0})",
    "isinf": "std::isinf({0})",
}
BINARY: dict[str, str] = {
    "mul": "{0} * {1}",
    "div": "(float){0} / (float){1}",
    "pow": "std::pow((float){0}, (float){1})",
    "maximum": "({0} > {1} ? {0} : {1})",
    "minimum": "({0} < {1} ? {0} : {1})",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": "({0} != 0) && ({1} != 0)",
    "logical_or": "({0} != 0) || ({1} != 0)",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "hypot": "std::hypot({0}, {1})",
}


def literal(value: Any) -> str:
    """A Python number as a C++ literal."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int):
        return f"INT64_C({value})" if abs(value) > 2**31 else str(value)
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{float(value)!r}f"


def operand_list(emitter: Emitter, args: tuple[Any, ...]) -> tuple[list[Value], list[str]]:
    """Tensor operands, and for each argument its text: `{n}` for the n-th tensor, or a literal."""
    values: list[Value] = []
    texts: list[str] = []
    for arg in args:
        lowered = emitter.lowered(arg) if isinstance(arg, fx.Node) else None
        if isinstance(lowered, Value):
            texts.append("{" + str(len(values)) + "}")
            values.append(lowered)
        elif isinstance(arg, fx.Node):
            texts.append(f"(int64_t)({c_size(emitter.size(arg))})")
        else:
            texts.append(literal(arg))
    return values, texts


def _fill(template: str, texts: list[str]) -> str:
    for index in range(len(texts)):
        template = template.replace("{" + str(index) + "}", f"\0{index}\0")
    for index, text in enumerate(texts):
        template = template.replace(f"\0{index}\0", text)
    return template


def _apply(emitter: Emitter, node: fx.Node, template: str, args: tuple[Any, ...]) -> Value:
    values, texts = operand_list(emitter, args)
    out = emitter.output(node)
    emitter.loop(emitter.comment(node), out, values, _fill(template, texts))
    return out


def _fixed(template: str, arity: int) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> Value:
        return _apply(emitter, node, template, node.args[:arity])

    return lower


def _add(sign: str) -> Callable[[Emitter, fx.Node], Value]:
    def lower(emitter: Emitter, node: fx.Node) -> Value:
        alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        second = "{1}" if alpha == 1 else f"{literal(alpha)} * {{1}}"
        return _apply(emitter, node, "{0} " + sign + " " + second, node.args[:2])

    return lower


def _rsub(emitter: Emitter, node: fx.Node) -> Value:
    return _apply(emitter, node, "{1} - {0}", node.args[:2])


def _div(emitter: Emitter, node: fx.Node) -> Value:
    mode = node.kwargs.get("rounding_mode")
    text = {None: BINARY["div"], "floor": "std::floor((double){0} / (double){1})",
            "trunc": "std::trunc((double){0} / (double){1})"}[str(mode) if mode else None]  # fmt: skip
    return _apply(emitter, node, text, node.args[:2])


def _floor_divide(emitter: Emitter, node: fx.Node) -> Value:
    return _apply(emitter, node, "std::floor((double){0} / (double){1})", node.args[:2])


def _pow(emitter: Emitter, node: fx.Node) -> Value:
    exponent: Any = node.args[1]
    known = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "std::sqrt({0})", -0.5: "1.0f / std::sqrt({0})",
             1: "{0}", -1: "1.0f / {0}"}  # fmt: skip
    if isinstance(exponent, int | float) and exponent in known:
        return _apply(emitter, node, known[exponent], node.args[:1])
    return _apply(emitter, node, BINARY["pow"], node.args[:2])


def _gelu(emitter: Emitter, node: fx.Node) -> Value:
    tanh = "0.5f * {0} * (1.0f + std::tanh(0.7978845608028654f * ({0} + 0.044715f * {0} * {0} * {0})))"
    exact = "0.5f * {0} * (1.0f + std::erf({0} * 0.7071067811865476f))"
    approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return _apply(emitter, node, tanh if approximate == "tanh" else exact, node.args[:1])


def _clamp(emitter: Emitter, node: fx.Node) -> Value:
    low: Any = node.kwargs.get("min", node.args[1] if len(node.args) > 1 else None)
    high: Any = node.kwargs.get("max", node.args[2] if len(node.args) > 2 else None)
    return _clamped(emitter, node, low, high)


def _clamped(emitter: Emitter, node: fx.Node, low: Any, high: Any) -> Value:
    args: list[Any] = [node.args[0]]
    text = "{0}"
    if low is not None:
        args.append(low)
        text = f"llmc::max2({text}, {{{len(args) - 1}}})"
    if high is not None:
        args.append(high)
        text = f"llmc::min2({text}, {{{len(args) - 1}}})"
    return _apply(emitter, node, text, tuple(args))


def _clamp_min(emitter: Emitter, node: fx.Node) -> Value:
    return _clamped(emitter, node, node.args[1], None)


def _clamp_max(emitter: Emitter, node: fx.Node) -> Value:
    return _clamped(emitter, node, None, node.args[1])


def _where(emitter: Emitter, node: fx.Node) -> Value:
    return _apply(emitter, node, "({0} ? {1} : {2})", node.args[:3])


def _masked_fill(emitter: Emitter, node: fx.Node) -> Value:
    return _apply(emitter, node, "({1} ? {2} : {0})", node.args[:3])


def _softplus(emitter: Emitter, node: fx.Node) -> Value:
    beta: Any = node.args[1] if len(node.args) > 1 else 1.0
    threshold: Any = node.args[2] if len(node.args) > 2 else 20.0
    b = literal(float(beta))
    scaled = f"({{0}} * {b})"
    text = f"({scaled} > {literal(float(threshold))} ? {{0}} : std::log1p(std::exp({scaled})) / {b})"
    return _apply(emitter, node, text, node.args[:1])


def _leaky_relu(emitter: Emitter, node: fx.Node) -> Value:
    slope: Any = node.args[1] if len(node.args) > 1 else 0.01
    return _apply(emitter, node, f"({{0}} > 0 ? {{0}} : {{0}} * {literal(float(slope))})", node.args[:1])


def _remainder(emitter: Emitter, node: fx.Node) -> Value:
    return _apply(emitter, node, "llmc::floor_mod({0}, {1})", node.args[:2])


def _softcap(emitter: Emitter, node: fx.Node) -> Value:
    cap: Any = node.args[1]
    return _apply(emitter, node, f"std::tanh({{0}} / {literal(cap)}) * {literal(cap)}", node.args[:1])


def _constant(emitter: Emitter, node: fx.Node) -> Value:
    """full, zeros, ones and their _like and new_ forms."""
    name = str(node.target).split(".")[1]
    if "full" in name:
        value: Any = node.args[1]
    elif name == "scalar_tensor":
        value = node.args[0]
    else:
        value = 1 if "ones" in name else 0
    out = emitter.output(node)
    emitter.loop(emitter.comment(node), out, [], literal(value))
    return out


def _arange(emitter: Emitter, node: fx.Node) -> Value:
    start, step = 0, 1
    if "start" in str(node.target):
        start = node.args[0]
        step = node.args[2] if len(node.args) > 2 else 1
    _, texts = operand_list(emitter, (start, step))
    out = emitter.output(node)
    emitter.loop(emitter.comment(node), out, [], f"{texts[0]} + {{i0}} * {texts[1]}")
    return out


LOWERINGS: dict[str, Lowering] = {
    **{f"aten.{name}": _fixed(text, 1) for name, text in UNARY.items()},
    **{f"aten.{name}": _fixed(text, 2) for name, text in BINARY.items()},
    "aten.max.other": _fixed(BINARY["maximum"], 2),
    "aten.min.other": _fixed(BINARY["minimum"], 2),
    "aten.add": _add("+"),
    "aten.sub": _add("-"),
    "aten.rsub": _rsub,
    "aten.div": _div,
    "aten.floor_divide": _floor_divide,
    "aten.pow": _pow,
    "aten.gelu": _gelu,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp_min,
    "aten.clamp_max": _clamp_max,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    "aten.softplus": _softplus,
    "aten.leaky_relu": _leaky_relu,
    "aten.remainder": _remainder,
    "llmc.softcap": _softcap,
    "aten.arange": _arange,
    **dict.fromkeys(
        ("aten.full", "aten.full_like", "aten.zeros", "aten.ones", "aten.zeros_like", "aten.ones_like",
         "aten.new_zeros", "aten.new_ones", "aten.empty", "aten.scalar_tensor"), _constant
    ),
}  # fmt: skip
