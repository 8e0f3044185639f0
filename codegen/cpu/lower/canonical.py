"""The `llmc::` operators as calls of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ....kernels.packing import has_layout
from ....spec.errors import TargetError
from ....spec.quant import parse_scheme
from ..emitter import Emitter, Lowering
from ..matrix import CodeMatrix, CodeNames, Matrix, StoredMatrix, TableMatrix
from ..unit import Parameter, pointer
from ..value import Size, Value, c_size, product
from .elementwise import literal
from .products import matrix_product

_ACCESSORS = tuple(f"llmc::plain::{name}" for name in ("Tiles", "CodeTiles", "TableTiles"))


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


def stored(arg: Any) -> tuple[str, tuple[int, ...], Any]:
    """Name, shape and dtype of a weight that is stored as it is."""
    if arg.op != "get_attr":
        raise NotImplementedError("a matrix that is computed, not stored")
    return str(arg.target), tuple(arg.meta["val"].shape), arg.meta["val"].dtype


def quantized_matrix(args: Sequence[Any], scheme_name: str, width: int) -> CodeMatrix | TableMatrix:
    """A quantised matrix, or the stacked ones of experts: for integer products where there are any for its
    scheme, else for those that look values up. `args` = codes, scales, zeros or None."""
    scheme = parse_scheme(scheme_name)
    codes, scales, zeros = (None if arg is None else str(arg.target) for arg in args)
    assert codes is not None
    assert scales is not None
    shape = [int(size) for size in args[0].meta["val"].shape]
    names = CodeNames(
        codes=codes,
        scales=scales,
        zeros=zeros,
        experts=shape[0] if len(shape) == 3 else 0,
        rows=shape[-2],
        width=width,
        scheme=scheme,
    )
    return CodeMatrix(names) if has_layout(scheme) else TableMatrix(names)


def dense(emitter: Emitter, arg: Any, node: fx.Node) -> Value:
    """The argument's value with its elements in row-major order."""
    return emitter.contiguous(emitter.value(arg), node)


def optional_dense(emitter: Emitter, arg: Any, node: fx.Node) -> Value | None:
    """The same of an argument that may be None."""
    return None if arg is None else dense(emitter, arg, node)


def _present(*values: Value | None) -> list[Value]:
    return [value for value in values if value is not None]


def _linear(emitter: Emitter, node: fx.Node) -> Value:
    x, bias = dense(emitter, node.args[0], node), optional_dense(emitter, node.args[2], node)
    return matrix_product(emitter, node, StoredMatrix(*stored(node.args[1])), emitter.output(node), x, bias)


def _quantized_linear(emitter: Emitter, node: fx.Node) -> Value:
    x, bias = dense(emitter, node.args[0], node), optional_dense(emitter, node.args[4], node)
    matrix = quantized_matrix(node.args[1:4], str(node.args[5]), int(x.shape[-1]))
    activation = str(node.args[6]) if len(node.args) > 6 else ""
    return matrix_product(emitter, node, matrix, emitter.output(node), x, bias, activation)


def _lookup(emitter: Emitter, node: fx.Node, matrix: Matrix) -> Value:
    ids, out = dense(emitter, node.args[0], node), emitter.output(node)
    arguments = [out, ids, matrix.lookup(emitter.slots), product(ids.shape), out.shape[-1]]
    call_kernel(emitter, node, "llmc::plain::embedding", arguments, [ids], [out])
    return out


def _embedding(emitter: Emitter, node: fx.Node) -> Value:
    return _lookup(emitter, node, StoredMatrix(*stored(node.args[1])))


def _quantized_embedding(emitter: Emitter, node: fx.Node) -> Value:
    width: Any = node.args[5]
    return _lookup(emitter, node, quantized_matrix(node.args[1:4], str(node.args[4]), width))


def _norm(kind: str, has_residual: bool) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> Any:
        args: list[Any] = list(node.args)
        x = dense(emitter, args.pop(0), node)
        residual = dense(emitter, args.pop(0), node) if has_residual else None
        weight = optional_dense(emitter, args.pop(0), node)
        bias = optional_dense(emitter, args.pop(0), node) if kind == "kLayer" else None
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


ACTIVATION_KINDS = {
    "silu": "kSilu",
    "gelu": "kGelu",
    "gelu_tanh": "kGeluTanh",
    "relu": "kRelu",
    "relu2": "kRelu2",
    "sigmoid": "kSigmoid",
    "identity": "kIdentity",
}


def activation_kind(name: str) -> str:
    """The C++ name of an activation. Raises TargetError for one this target has no form of."""
    activation_text(name, "x")
    return f"llmc::Activation::{ACTIVATION_KINDS[name]}"


def _gated_rows(emitter: Emitter, node: fx.Node, gate: Value, up: Value, activation: str) -> Value:
    """`activation(gate) * up` for rows whose columns lie one after the other."""
    out = emitter.output(node)
    rows, width = c_size(product(out.shape[:-1])), c_size(out.shape[-1])
    strides = [c_size(value.strides[-2]) if len(value.shape) > 1 else "0" for value in (gate, up)]
    combine = f"llmc::Gated<{activation_kind(activation)}>{{}}"
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
}
