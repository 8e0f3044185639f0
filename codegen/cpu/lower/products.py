"""Matrix products by tuned kernels: activations rounded once for all products that read them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from ....kernels.catalog import WHOLE_ROW
from ....kernels.tables import table_group
from ..emitter import Emitter
from ..matrix import CodeMatrix, Matrix, StoredMatrix, TableMatrix, no_activation
from ..unit import Parameter, pointer
from ..value import Size, Value, c_size, product


@dataclass(frozen=True, slots=True)
class Slots:
    """The (token, choice) pairs of experts: rows of a product are slots, sorted by expert.

    `by_token`: the product's input has a row a token, else a row a slot.
    """

    groups: Value
    experts: int
    tokens: Size
    choices: Size
    by_token: bool

    @property
    def text(self) -> str:
        """C++ for the groups, of parameter `g`."""
        counts = f"{self.experts}, {c_size(self.tokens)}, {c_size(self.choices)}"
        return f"llmc::expert_groups((void*)g, {counts})"


def matrix_product(
    emitter: Emitter,
    node: fx.Node,
    matrix: Matrix,
    out: Value,
    x: Value,
    bias: Value | None,
    activation: str = "",
    slots: Slots | None = None,
) -> Value:
    """`out = x @ weight.T + bias` for rows of x, or for the slots of experts."""
    if isinstance(matrix, CodeMatrix):
        x_rows = product(x.shape[:-1])
        read = _rounded(emitter, node, matrix, x, activation)
        kind = matrix.kernel(activation).scheme_type
        layout = f"llmc::quant_rows<{kind}>((void*)x, {c_size(x_rows)}, {c_size(x.shape[-1])})"
        left, struct, kernel = f"{layout}, nullptr", "Product", f"quantized_linear<{kind}>"
    else:
        read = x
        if isinstance(matrix, TableMatrix) and activation and not activation.startswith("int16"):
            raise no_activation(activation, f"it multiplies {matrix.of.scheme.name} codes in float32")
        left = f"x, {c_size(x.shape[-1])}, nullptr"
        struct, kernel = "FloatProduct", f"float_linear<{_element(matrix)}>"
        if isinstance(matrix, TableMatrix):
            struct, kernel = "TableProduct", f"table_linear<{matrix.kind}>"
    return _call(emitter, node, matrix, (struct, kernel, left), out, x, read, bias, slots)


def _element(matrix: Matrix) -> str:
    return matrix.element if isinstance(matrix, StoredMatrix) else ""


def _rounded(emitter: Emitter, node: fx.Node, matrix: CodeMatrix, x: Value, activation: str) -> Value:
    """The int8 limbs of `x`, made once for all products of one kind that read it."""
    kernel = matrix.kernel(activation)
    key = (x, f"{kernel.scheme_type} {kernel.activation_group}")
    if key in emitter.shared:
        return emitter.shared[key]
    rows, width = product(x.shape[:-1]), int(x.shape[-1])
    row_bytes = kernel.quant_row_bytes(width)
    out = emitter.buffer(
        f"{node.name}_codes{len(emitter.unit.calls)}", "float", (rows, sympy.Integer(-(-row_bytes // 4)))
    )
    layout = f"llmc::quant_rows<{kernel.scheme_type}>(o, {c_size(rows)}, {width})"
    text = f"llmc::quantize_rows<{kernel.scheme_type}, {kernel.activation_group or WHOLE_ROW}>"
    body = f"  {text}(tid, nt, x, {width}, {c_size(rows)}, {width}, {layout});"
    function = emitter.unit.function("quantize", [("float*", "o"), ("const float*", "x")], body)
    comment = f"int8 limbs of the input of {node.name}"
    emitter.unit.call(comment, function, [pointer(out), pointer(x)], [x], [out])
    emitter.shared[key] = out
    return out


def _call(
    emitter: Emitter,
    node: fx.Node,
    matrix: Matrix,
    texts: tuple[str, str, str],
    out: Value,
    x: Value,
    read: Value,
    bias: Value | None,
    slots: Slots | None,
) -> Value:
    """The statement; `texts` are the product's struct, kernel and left operand."""
    struct, kernel, left = texts
    width, columns = c_size(x.shape[-1]), c_size(out.shape[-1])
    rows = "0" if slots is not None else c_size(product(x.shape[:-1]))
    tail = f"{columns}, {width}, {columns}"
    if isinstance(matrix, TableMatrix):
        tail += f", {table_group(matrix.of.scheme, int(x.shape[-1]))}"
    weight_type = "const void*" if isinstance(matrix, StoredMatrix) else "const uint8_t*"
    names: list[Parameter] = [
        ("float*", "y"),
        ("const float*", "x"),
        (weight_type, "w"),
        ("const float*", "b"),
    ]
    added = "nullptr" if bias is None else pointer(bias)
    arguments = [pointer(out), pointer(read), f"({weight_type}){emitter.slots.pointer(matrix)}", added]
    reads = [value for value in (read, bias) if value is not None]
    call = f"llmc::{kernel}(tid, nt, p);"
    if slots is not None:
        names.append(("const float*", "g"))
        arguments.append(pointer(slots.groups))
        reads.append(slots.groups)
        by_token = "true" if slots.by_token else "false"
        call = f"llmc::{_of_experts(kernel)}(tid, nt, {slots.text}, p, {by_token});"
    body = f"  const llmc::{struct} p{{w, {left}, {rows}, b, y, {tail}}};\n  {call}"
    function = emitter.unit.function(kernel.partition("<")[0], names, body)
    emitter.unit.call(emitter.comment(node), function, arguments, reads, [out])
    return out


def _of_experts(kernel: str) -> str:
    return "expert_" + kernel.removeprefix("quantized_")
