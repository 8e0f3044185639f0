"""The `llmc::` operators as calls of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ....kernels.packing import layout_of
from ....spec.errors import TargetError
from ....spec.quant import parse_scheme
from ..emitter import Emitter, Lowering
from ..matrix import CodeExperts, CodeMatrix, Experts, Matrix, StoredExperts, StoredMatrix
from ..unit import Parameter, pointer
from ..value import Size, Value, c_size, product
from .elementwise import literal
from .products import float_product, integer_product

_ACCESSORS = tuple(f"llmc::plain::{name}" for name in ("Rows", "Codes", "Tiles", "CodeTiles"))


def call_kernel(
    emitter: Emitter,
    node: fx.Node,
    kernel: str,
    arguments: Sequence[str | Value | Size | int | float | None],
    reads: Sequence[Value],
    writes: Sequence[Value],
) -> None:
    """Statement `kernel(tid, nt, arguments...)`: values become pointers, sizes numbers, None a null."""
    texts: list[str] = []
    parameters: list[Parameter] = []
    passed: list[str] = []
    for argument in arguments:
        if isinstance(argument, Value):
            name = f"p{len(parameters)}"
            constant = "" if argument.base in {value.base for value in writes} else "const "
            parameters.append((f"{constant}{argument.ctype}*", name))
            passed.append(pointer(argument))
            texts.append(name)
        elif isinstance(argument, sympy.Expr):
            texts.append(c_size(argument))
        elif argument is None:
            texts.append("nullptr")
        elif isinstance(argument, str) and argument.startswith(_ACCESSORS):
            name = f"p{len(parameters)}"
            kind, _, content = argument.partition("{")
            parameters.append((kind, name))
            passed.append(f"{kind}{{{content}")
            texts.append(name)
        else:
            texts.append(argument if isinstance(argument, str) else literal(argument))
    function = emitter.unit.function(
        kernel.split("::")[-1].split("<")[0], parameters, f"  {kernel}(tid, nt, {', '.join(texts)});"
    )
    emitter.unit.call(emitter.comment(node), function, passed, reads, writes)


def _stored(arg: Any) -> tuple[str, tuple[int, ...], Any]:
    if arg.op != "get_attr":
        raise NotImplementedError("a matrix that is computed, not stored")
    return str(arg.target), tuple(arg.meta["val"].shape), arg.meta["val"].dtype


def _codes(args: Sequence[Any], scheme_name: str, width: int) -> CodeMatrix | CodeExperts:
    """The quantised matrix, in the layout of a tuned kernel where there is one for its scheme."""
    scheme = parse_scheme(scheme_name)
    codes, scales, zeros = (None if arg is None else str(arg.target) for arg in args)
    assert codes is not None
    assert scales is not None
    shape = args[0].meta["val"].shape
    if scheme.code_type != "int" or scheme.scale_dtype != "float16":
        layout_of(scheme)  # raises, and says why
    if len(shape) == 2 and scheme.group_size % 32 == 0:
        return CodeMatrix(codes, scales, zeros, int(shape[0]), width, scheme)
    return CodeExperts(codes, scales, zeros, width, int(shape[-1]), scheme)


def _refuse_activation(name: str) -> None:
    """This target chooses how it rounds activations itself."""
    if name:
        raise TargetError(
            "cpu.activation_scheme",
            f"The program asks for activations rounded as {name}.",
            "The CPU target rounds activations by its own number of limbs.",
            "Leave the activation scheme out, or compile with --target reference.",
        )


def _dense(emitter: Emitter, arg: Any, node: fx.Node) -> Value:
    return emitter.contiguous(emitter.value(arg), node)


def _optional(emitter: Emitter, arg: Any, node: fx.Node) -> Value | None:
    return None if arg is None else _dense(emitter, arg, node)


def _present(*values: Value | None) -> list[Value]:
    return [value for value in values if value is not None]


def _linear(emitter: Emitter, node: fx.Node) -> Value:
    matrix = StoredMatrix(*_stored(node.args[1]))
    x, bias = _dense(emitter, node.args[0], node), _optional(emitter, node.args[2], node)
    out = emitter.output(node)
    address = emitter.slots.pointer(matrix)
    return float_product(emitter, node, matrix.element, address, out, x, bias)


def _quantized_linear(emitter: Emitter, node: fx.Node) -> Value:
    x, bias = _dense(emitter, node.args[0], node), _optional(emitter, node.args[4], node)
    matrix = _codes(node.args[1:4], str(node.args[5]), int(x.shape[-1]))
    _refuse_activation(str(node.args[6]) if len(node.args) > 6 else "")
    out = emitter.output(node)
    if isinstance(matrix, CodeMatrix):
        return integer_product(emitter, node, matrix, out, x, bias)
    sizes = [product(x.shape[:-1]), out.shape[-1], x.shape[-1]]
    arguments = [out, x, matrix.lookup(emitter.slots), bias, *sizes]
    call_kernel(emitter, node, "llmc::plain::linear", arguments, _present(x, bias), [out])
    return out


def _lookup(emitter: Emitter, node: fx.Node, matrix: Matrix | Experts) -> Value:
    ids, out = _dense(emitter, node.args[0], node), emitter.output(node)
    arguments = [out, ids, matrix.lookup(emitter.slots), product(ids.shape), out.shape[-1]]
    call_kernel(emitter, node, "llmc::plain::embedding", arguments, [ids], [out])
    return out


def _embedding(emitter: Emitter, node: fx.Node) -> Value:
    return _lookup(emitter, node, StoredMatrix(*_stored(node.args[1])))


def _quantized_embedding(emitter: Emitter, node: fx.Node) -> Value:
    width: Any = node.args[5]
    return _lookup(emitter, node, _codes(node.args[1:4], str(node.args[4]), width))


def _norm(kind: str, has_residual: bool) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> Any:
        args: list[Any] = list(node.args)
        x = _dense(emitter, args.pop(0), node)
        residual = _dense(emitter, args.pop(0), node) if has_residual else None
        weight = _optional(emitter, args.pop(0), node)
        bias = _optional(emitter, args.pop(0), node) if kind == "kLayer" else None
        rows, width = c_size(product(x.shape[:-1])), c_size(x.shape[-1])
        weights = f"llmc::NormWeights{{w, b, {literal(float(args[0]))}, {literal(float(args[1]))}}}"
        template = f"<llmc::Norm::{kind}>"
        out = emitter.output(node, 0 if has_residual else None)
        total = emitter.output(node, 1) if has_residual else None
        pieces = [(out, "float*", "o"), (x, "const float*", "x"), (weight, "const float*", "w")]
        pieces.append((bias, "const float*", "b"))
        if has_residual:
            pieces += [(residual, "const float*", "r"), (total, "float*", "t")]
            call = f"llmc::add_norm_rows{template}(tid, nt, x, r, t, o, {width}, {rows}, {width}, {weights})"
        else:
            call = f"llmc::norm_rows{template}(tid, nt, x, {width}, o, {width}, {rows}, {width}, {weights})"
        function = emitter.unit.function("norm", [(kind, name) for _, kind, name in pieces], f"  {call};")
        arguments = ["nullptr" if value is None else pointer(value) for value, _, _ in pieces]
        reads, writes = _present(x, residual, weight, bias), _present(out, total)
        emitter.unit.call(emitter.comment(node), function, arguments, reads, writes)
        return out if total is None else (out, total)

    return lower


_ACTIVATION_TEXT = {
    "silu": "{g} / (1.0f + std::exp(-{g}))",
    "gelu": "0.5f * {g} * (1.0f + std::erf({g} * 0.7071067811865476f))",
    "gelu_tanh": "0.5f * {g} * (1.0f + std::tanh(0.7978845608028654f * ({g} + 0.044715f * {g} * {g} * {g})))",
    "relu": "({g} > 0 ? {g} : 0)",
    "relu2": "({g} > 0 ? {g} * {g} : 0)",
    "sigmoid": "1.0f / (1.0f + std::exp(-{g}))",
    "identity": "{g}",
}


def activation_text(name: str, gate: str) -> str:
    """C++ for an activation of `gate`. Raises TargetError for one this target has no form of."""
    if name not in _ACTIVATION_TEXT:
        raise TargetError(
            "cpu.activation",
            f"The model uses the activation {name!r}.",
            f"The CPU target knows: {', '.join(sorted(_ACTIVATION_TEXT))}.",
            "Compile with --target reference, and report the model.",
        )
    return "(" + _ACTIVATION_TEXT[name].replace("{g}", gate) + ")"


_ACTIVATION_KINDS = {
    "silu": "kSilu",
    "gelu": "kGelu",
    "gelu_tanh": "kGeluTanh",
    "relu": "kRelu",
    "relu2": "kRelu2",
    "sigmoid": "kSigmoid",
    "identity": "kIdentity",
}


def _gated_rows(emitter: Emitter, node: fx.Node, gate: Value, up: Value, activation: str) -> Value:
    """`activation(gate) * up` for rows whose columns lie one after the other."""
    activation_text(activation, "x")
    out = emitter.output(node)
    rows, width = c_size(product(out.shape[:-1])), c_size(out.shape[-1])
    strides = [c_size(value.strides[-2]) if len(value.shape) > 1 else "0" for value in (gate, up)]
    combine = f"llmc::Gated<llmc::Activation::{_ACTIVATION_KINDS[activation]}>{{}}"
    call = (
        f"llmc::gated_rows(tid, nt, {combine}, g, {strides[0]}, u, {strides[1]}, o, {width}, {rows}, {width})"
    )
    parameters = [("float*", "o"), ("const float*", "g"), ("const float*", "u")]
    function = emitter.unit.function("gated", parameters, f"  {call};")
    arguments = [pointer(value) for value in (out, gate, up)]
    emitter.unit.call(emitter.comment(node), function, arguments, [gate, up], [out])
    return out


def _gated(emitter: Emitter, node: fx.Node) -> Value:
    gate, up = (emitter.value(arg) for arg in node.args[:2])
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    if len(shape) == 2 and gate.shape == up.shape == shape:
        gate, up = (v if v.strides[-1] == 1 else emitter.contiguous(v, node) for v in (gate, up))
        return _gated_rows(emitter, node, gate, up, str(node.args[2]))
    out = emitter.output(node)
    text = activation_text(str(node.args[2]), "{0}") + " * {1}"
    emitter.loop(emitter.comment(node), out, [gate, up], text)
    return out


def _gated_packed(emitter: Emitter, node: fx.Node) -> Value:
    packed = emitter.contiguous(emitter.value(node.args[0]), node)
    shape = emitter.symbols.sizes(node.meta["val"].shape)
    gate = packed.viewed(shape, packed.strides)
    up = packed.viewed(shape, packed.strides, shape[-1])
    if len(shape) == 2:
        return _gated_rows(emitter, node, gate, up, str(node.args[1]))
    out = emitter.output(node)
    text = activation_text(str(node.args[1]), "{0}") + " * {1}"
    emitter.loop(emitter.comment(node), out, [gate, up], text)
    return out


def _moe_activation(name: str, width: Size, interleaved: bool, alpha: float, limit: float) -> str:
    """A lambda `(gated, hidden)` that applies the experts' activation to one token."""
    if name.startswith("plain:"):
        gate, body = "hidden[f]", activation_text(name.removeprefix("plain:"), "g")
        up = "0"
    else:
        gate = "hidden[2*f]" if interleaved else "hidden[f]"
        up = "hidden[2*f + 1]" if interleaved else f"hidden[f + {c_size(width)}]"
        body = "(u + 1) * (g * (1.0f / (1.0f + std::exp(-g * a))))" if name == "clamped_swiglu" else (
            activation_text(name, "g") + " * u")  # fmt: skip
    clamp = ""
    if name == "clamped_swiglu":
        clamp = (
            f"const float a = {literal(alpha)}, m = {literal(limit)}; "
            "g = llmc::min2(g, m); u = llmc::max2(llmc::min2(u, m), -m); "
        )
    return (
        f"[&](float* gated, const float* hidden) {{ for (int64_t f = 0; f < {c_size(width)}; ++f) "
        f"{{ float g = {gate}, u = {up}; (void)u; {clamp}gated[f] = {body}; }} }}"
    )


def _experts(
    emitter: Emitter,
    node: fx.Node,
    gate_up: Experts,
    down: Experts,
    rest: Sequence[Any],
    sizes: tuple[int, int],
) -> Value:
    """`rest` = gate_up_bias, down_bias, activation, interleaved, alpha, limit; `sizes` = (U, F)."""
    x, ids, weights = (_dense(emitter, arg, node) for arg in node.args[:3])
    up_bias, down_bias = (_optional(emitter, arg, node) for arg in rest[:2])
    hidden, width = (sympy.Integer(size) for size in sizes)
    out = emitter.output(node)
    scratch = emitter.buffer(f"{node.name}_scratch", "float", (sympy.Symbol("NT"), hidden + width))
    act = _moe_activation(str(rest[2]), width, bool(rest[3]), float(rest[4]), float(rest[5]))
    counts = [product(ids.shape[:-1]), ids.shape[-1], x.shape[-1], width, hidden]
    matrices = [gate_up.lookup(emitter.slots), down.lookup(emitter.slots)]
    arguments = [out, x, ids, weights, *matrices, up_bias, down_bias, scratch, *counts, act]
    reads = _present(x, ids, weights, up_bias, down_bias, scratch)
    call_kernel(emitter, node, "llmc::plain::moe", arguments, reads, [out, scratch])
    return out


def _moe(emitter: Emitter, node: fx.Node) -> Value:
    args: list[Any] = list(node.args)
    gate_up, down = (StoredExperts(*_stored(arg)) for arg in args[3:5])
    sizes = (int(args[3].meta["val"].shape[1]), int(args[4].meta["val"].shape[2]))
    return _experts(emitter, node, gate_up, down, args[5:11], sizes)


def _quantized_moe(emitter: Emitter, node: fx.Node) -> Value:
    args: list[Any] = list(node.args)
    _refuse_activation(str(args[17]) if len(args) > 17 else "")
    width = int(args[0].meta["val"].shape[-1])
    hidden = int(args[3].meta["val"].shape[1])
    inner = hidden if str(args[11]).startswith("plain:") else hidden // 2
    gate_up, down = _codes(args[3:6], str(args[15]), width), _codes(args[6:9], str(args[16]), inner)
    assert isinstance(gate_up, CodeExperts)
    assert isinstance(down, CodeExperts)
    return _experts(emitter, node, gate_up, down, args[9:15], (hidden, inner))


LOWERINGS: dict[str, Lowering] = {
    "llmc.linear": _linear,
    "llmc.quantized_linear": _quantized_linear,
    "llmc.embedding": _embedding,
    "llmc.quantized_embedding": _quantized_embedding,
    "llmc.rms_norm": _norm("kRms", has_residual=False),
    "llmc.layer_norm": _norm("kLayer", has_residual=False),
    "llmc.add_rms_norm": _norm("kRms", has_residual=True),
    "llmc.add_layer_norm": _norm("kLayer", has_residual=True),
    "llmc.gated_activation": _gated,
    "llmc.gated_activation_packed": _gated_packed,
    "llmc.moe": _moe,
    "llmc.quantized_moe": _quantized_moe,
}
