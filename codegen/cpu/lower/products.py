"""Matrix products by tuned kernels: activations quantised once for all products that read them."""

from __future__ import annotations

import sympy
from torch import fx

from ..emitter import Emitter
from ..matrix import CodeMatrix
from ..unit import pointer
from ..value import Value, c_size, product


def float_product(
    emitter: Emitter, node: fx.Node, element: str, weight: str, out: Value, x: Value, bias: Value | None
) -> Value:
    """`out = x @ weight.T + bias` with floating-point tiles."""
    sizes = [c_size(size) for size in (product(x.shape[:-1]), x.shape[-1], out.shape[-1])]
    rows, width, columns = sizes
    body = "\n".join(
        [
            f"  const llmc::FloatProduct p{{w, x, {width}, nullptr, {rows}, b, y,",
            f"                             {columns}, {width}, {columns}}};",
            f"  llmc::float_linear<{element}>(tid, nt, p);",
        ]
    )
    return _call(emitter, node, "float_linear", body, "const void*", weight, out, x, bias)


def integer_product(
    emitter: Emitter, node: fx.Node, matrix: CodeMatrix, out: Value, x: Value, bias: Value | None
) -> Value:
    """`out = x @ weight.T + bias` with integer codes, after a statement that quantises x."""
    kind = matrix.kernel(emitter.limbs).scheme_type
    rows, width, columns = (c_size(size) for size in (product(x.shape[:-1]), x.shape[-1], out.shape[-1]))
    quantised = _quantised(emitter, node, matrix, x)
    layout = f"llmc::quant_rows<{kind}>((void*)x, {rows}, {width})"
    body = "\n".join(
        [
            f"  const llmc::Product p{{w, {layout}, nullptr, {rows}, b, y, {columns}, {width}, {columns}}};",
            f"  llmc::quantized_linear<{kind}>(tid, nt, p);",
        ]
    )
    weight = emitter.slots.pointer(matrix)
    return _call(emitter, node, "quantized_linear", body, "const uint8_t*", weight, out, quantised, bias)


def _quantised(emitter: Emitter, node: fx.Node, matrix: CodeMatrix, x: Value) -> Value:
    """The int8 limbs of `x`, made once for all products of one kind that read it."""
    kernel = matrix.kernel(emitter.limbs)
    key = (x, kernel.scheme_type)
    if key in emitter.shared:
        return emitter.shared[key]
    rows, width = product(x.shape[:-1]), int(x.shape[-1])
    row_bytes = kernel.quant_row_bytes(width)
    out = emitter.buffer(f"{node.name}_codes", "float", (rows, sympy.Integer(-(-row_bytes // 4))))
    layout = f"llmc::quant_rows<{kernel.scheme_type}>(o, {c_size(rows)}, {width})"
    text = f"llmc::quantize_rows<{kernel.scheme_type}, {kernel.activation_group}>"
    body = f"  {text}(tid, nt, x, {width}, {c_size(rows)}, {width}, {layout});"
    function = emitter.unit.function("quantize", [("float*", "o"), ("const float*", "x")], body)
    comment = f"int8 limbs of the input of {node.name}"
    emitter.unit.call(comment, function, [pointer(out), pointer(x)], [x], [out])
    emitter.shared[key] = out
    return out


def _call(
    emitter: Emitter,
    node: fx.Node,
    stem: str,
    body: str,
    weight_type: str,
    weight: str,
    out: Value,
    x: Value,
    bias: Value | None,
) -> Value:
    names = [("float*", "y"), ("const float*", "x"), (weight_type, "w"), ("const float*", "b")]
    function = emitter.unit.function(stem, names, body)
    added = "nullptr" if bias is None else pointer(bias)
    arguments = [pointer(out), pointer(x), f"({weight_type}){weight}", added]
    reads = [x] if bias is None else [x, bias]
    emitter.unit.call(emitter.comment(node), function, arguments, reads, [out])
    return out
