"""Walks a final Program node by node and asks each operator's lowering for calls.

Holds what lowerings share: values of nodes, the unit, and the text of strided loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from ...ir.printer import print_node
from .matrix import PlainSlot, WeightSlots
from .unit import Unit, pointer
from .value import C_TYPES, Size, Symbols, Value, c_size, contiguous_strides, product, reshape_strides

Lowered = Value | Size | tuple[Any, ...] | None
Lowering = Callable[["Emitter", fx.Node], Lowered]


@dataclass(slots=True)
class Emitter:
    """State of one code generation. `shared` holds what several nodes derive from one value: its limbs, its
    angles, the slots of its experts."""

    symbols: Symbols
    unit: Unit = field(default_factory=Unit)
    slots: WeightSlots = field(default_factory=WeightSlots)
    env: dict[fx.Node, Lowered] = field(default_factory=dict[fx.Node, Lowered])
    shared: dict[tuple[Value, str], Value] = field(default_factory=dict[tuple[Value, str], Value])

    def value(self, arg: Any) -> Value:
        """The tensor value of a node argument; a weight is taken in its plain form."""
        if arg.op == "get_attr":
            shape = self.symbols.sizes(arg.meta["val"].shape)
            base = self.slots.pointer(PlainSlot(str(arg.target)))
            return Value(base, C_TYPES[arg.meta["val"].dtype], shape, contiguous_strides(shape))
        found = self.env[arg]
        assert isinstance(found, Value)
        return found

    def lowered(self, arg: Any) -> Lowered:
        """Whatever a node argument became."""
        return self.value(arg) if arg.op == "get_attr" else self.env[arg]

    def size(self, arg: Any) -> Size:
        """A size argument: an int, or a node that computed one."""
        if isinstance(arg, int):
            return sympy.Integer(arg)
        found = self.env[arg]
        assert isinstance(found, sympy.Expr)
        return found

    def comment(self, node: fx.Node) -> str:
        """The graph node a statement comes from, as the program prints it."""
        return print_node(node, self.symbols.names)

    def output(self, node: fx.Node, index: int | None = None) -> Value:
        """A new contiguous buffer for the node's result (or its `index`-th result)."""
        meta = node.meta["val"] if index is None else node.meta["val"][index]
        name = node.name if index is None else f"{node.name}_{index}"
        return self.buffer(name, C_TYPES[meta.dtype], self.symbols.sizes(meta.shape))

    def buffer(self, name: str, ctype: str, shape: tuple[Size, ...]) -> Value:
        """A new contiguous arena buffer."""
        base = self.unit.new_buffer(f"buf_{name}", ctype, shape)
        return Value(base, ctype, shape, contiguous_strides(shape))

    def contiguous(self, value: Value, node: fx.Node) -> Value:
        """`value`, copied to a dense buffer when it is not one already."""
        if value.is_contiguous:
            return value
        out = self.buffer(f"{node.name}_dense{len(self.unit.calls)}", value.ctype, value.shape)
        self.loop(self.comment(node) + " (dense copy)", out, [value], "{0}")
        return out

    def reshaped(self, value: Value, shape: tuple[Size, ...], node: fx.Node) -> Value:
        """`value` in another shape, copied when strides do not allow a view."""
        strides = reshape_strides(value, shape)
        if strides is None:
            value = self.contiguous(value, node)
            strides = contiguous_strides(shape)
        return value.viewed(shape, strides)

    def loop(self, comment: str, out: Value, operands: Sequence[Value], expression: str) -> None:
        """Statement `out[i...] = expression`, operands `{0}`, `{1}`, ... broadcast to out's shape.

        In `expression`, `{i0}`, `{i1}`, ... are the indexes. `out` must be contiguous.
        """
        body = elementwise_body(out, operands, expression)
        names = [(f"{out.ctype}* __restrict", "o")]
        names += [(f"const {value.ctype}*", f"a{n}") for n, value in enumerate(operands)]
        function = self.unit.function("loop", names, body)
        arguments = [pointer(out), *(pointer(value) for value in operands)]
        self.unit.call(comment, function, arguments, operands, [out])


def broadcast_strides(value: Value, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Strides of `value` seen in the larger `shape` (0 where it repeats)."""
    missing = len(shape) - len(value.shape)
    own = [
        sympy.Integer(0) if size == 1 and want != 1 else stride
        for size, stride, want in zip(value.shape, value.strides, shape[missing:], strict=True)
    ]
    return (*([sympy.Integer(0)] * missing), *own)


def index_text(strides: Sequence[Size], names: Sequence[str]) -> str:
    """`i0*stride0 + i1*stride1 + ...`, zero terms left out."""
    terms = [
        name if stride == 1 else f"{name}*({c_size(stride)})"
        for stride, name in zip(strides, names, strict=True)
        if stride != 0
    ]
    return " + ".join(terms) or "0"


def outer_loop(shape: Sequence[Size]) -> list[str]:
    """Lines that share rows `r` of `shape[:-1]` among threads and give their indexes i0, i1, ..."""
    rows = product(tuple(shape[:-1]))
    lines = [f"  LLMC_SHARE(r, {c_size(rows)}) {{"]
    if len(shape) > 1:
        lines.append("    int64_t q = r;")
    for dim in range(len(shape) - 2, -1, -1):
        if dim == 0:
            lines.append("    const int64_t i0 = q;")
        else:
            size = c_size(shape[dim])
            lines.append(f"    const int64_t i{dim} = q % ({size}); q /= ({size});")
    return lines


def elementwise_body(out: Value, operands: Sequence[Value], expression: str) -> str:
    """The body of an elementwise function over parameters `o`, `a0`, `a1`, ..."""
    shape = out.shape or (sympy.Integer(1),)
    if len(shape) == 1:
        shape = (shape[0], sympy.Integer(1))
        operands = [
            value.viewed((*value.shape, sympy.Integer(1)), (*value.strides, sympy.Integer(0)))
            for value in operands
        ]
    last = len(shape) - 1
    names = [f"i{dim}" for dim in range(len(shape))]
    reads = {
        str(n): f"a{n}[{index_text(broadcast_strides(value, shape), names)}]"
        for n, value in enumerate(operands)
    }
    text = expression
    for key, read in reads.items():
        text = text.replace("{" + key + "}", read)
    for name in names:
        text = text.replace("{" + name + "}", name)
    size = c_size(shape[-1])
    return "\n".join(
        [
            *outer_loop(shape),
            f"    for (int64_t i{last} = 0; i{last} < {size}; ++i{last})",
            f"      o[r*({size}) + i{last}] = ({out.ctype})({text});",
            "  }",
        ]
    )
