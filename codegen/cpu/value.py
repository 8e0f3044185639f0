"""What a node's value is in generated C++: a buffer, a strided view of it, or a size expression.

Sizes are sympy expressions over the step's symbols (T, L, S, ...); every float value is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.printer import symbol_names
from ...ir.program import GraphInput
from ...spec.errors import TargetError

Size = sympy.Expr
Sizes = tuple[Size, ...]

C_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "float",
    torch.float16: "float",
    torch.float64: "float",
    torch.int64: "int64_t",
    torch.int32: "int64_t",
    torch.bool: "uint8_t",
}
ZERO: Size = sympy.Integer(0)
C_BYTES = {"float": 4, "int64_t": 8, "uint8_t": 1}


@dataclass(frozen=True, slots=True)
class Value:
    """A strided view of buffer `base`: `ctype` elements, strides and offset in elements."""

    base: str
    ctype: str
    shape: Sizes
    strides: Sizes
    offset: Size = ZERO

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie densely in row-major order (dimensions of size 1 do not count)."""
        dense = contiguous_strides(self.shape)
        pairs = zip(self.shape, self.strides, dense, strict=True)
        return all(size == 1 or stride == want for size, stride, want in pairs)

    def viewed(self, shape: Sizes, strides: Sizes, offset: Size = ZERO) -> Value:
        """Another view of the same buffer; `offset` is added to this view's."""
        return replace(self, shape=shape, strides=strides, offset=self.offset + offset)


@dataclass(frozen=True, slots=True)
class Symbols:
    """Translates the symbolic sizes of one graph to expressions over input dimension names."""

    names: dict[str, str]

    @staticmethod
    def of(graph: fx.Graph, inputs: tuple[GraphInput, ...]) -> Symbols:
        """The symbols of a graph whose values have been inferred."""
        return Symbols(symbol_names(graph, inputs))

    def size(self, dim: Any) -> Size:
        """`dim` (an int or a symbolic int) as an expression."""
        if isinstance(dim, int):
            return sympy.Integer(dim)
        expr = dim.node.expr
        table = {symbol: symbol_for(self.names[str(symbol)]) for symbol in expr.free_symbols}
        return sympy.expand(expr.subs(table))

    def sizes(self, shape: Any) -> Sizes:
        """A whole shape."""
        return tuple(self.size(dim) for dim in shape)


def symbol_for(name: str) -> sympy.Symbol:
    """The expression that stands for input dimension `name`."""
    return sympy.Symbol(name, integer=True, positive=True)


def contiguous_strides(shape: Sizes) -> Sizes:
    """Row-major strides of a dense tensor."""
    strides: list[Size] = []
    step: Size = sympy.Integer(1)
    for size in reversed(shape):
        strides.append(step)
        step = sympy.expand(step * size)
    return tuple(reversed(strides))


def product(shape: Sizes) -> Size:
    """Number of elements."""
    return sympy.expand(sympy.prod(shape)) if shape else sympy.Integer(1)


def c_size(expr: Size) -> str:
    """`expr` as C++ over int64 members of the step `s`.

    Raises TargetError for a form that has no exact integer translation.
    """
    if not (expr.is_polynomial() and all(c.is_integer for c in sympy.Poly(expr).coeffs())
            if expr.free_symbols else expr.is_integer):  # fmt: skip
        raise TargetError(
            "cpu.size_expression",
            f"A value of the model has the size {expr}.",
            "The CPU target writes sizes as integer polynomials of the step's dimensions.",
            "Compile with --target reference, and report the model.",
        )
    if not expr.free_symbols:
        return str(expr)
    terms: list[str] = []
    polynomial = sympy.Poly(expr)
    for powers, coefficient in polynomial.terms():
        factors = [str(coefficient)] if coefficient != 1 or not any(powers) else []
        for symbol, power in zip(polynomial.gens, powers, strict=True):
            factors += [_member(str(symbol))] * power
        terms.append("*".join(factors))
    return " + ".join(terms)


def _member(name: str) -> str:
    """`s.T`; block-table widths and page counts are arrays by cache group."""
    return f"s.{name[0]}[{name[1:]}]" if name[0] in "BP" and name[1:].isdigit() else f"s.{name}"


def reshape_strides(value: Value, shape: Sizes) -> Sizes | None:
    """Strides that view `value` in `shape` without a copy, or None when there are none."""
    if value.is_contiguous:
        return contiguous_strides(shape)
    old = [(s, st) for s, st in zip(value.shape, value.strides, strict=True) if s != 1]
    groups: list[tuple[Size, Size]] = []
    for size, stride in old:
        if groups and sympy.expand(stride * size - groups[-1][1]) == 0:
            groups[-1] = (sympy.expand(groups[-1][0] * size), stride)
        else:
            groups.append((size, stride))
    strides: list[Size] = []
    remaining = list(shape)
    for size, stride in groups:
        taken, count = [], sympy.Integer(1)
        while remaining and count != size:
            count = sympy.expand(count * remaining[0])
            taken.append(remaining.pop(0))
        if count != size:
            return None
        while remaining and remaining[0] == 1:
            taken.append(remaining.pop(0))
        strides += [sympy.expand(stride * inner) for inner in contiguous_strides(tuple(taken))]
    strides += [sympy.Integer(1)] * len(remaining)
    return tuple(strides) if all(size == 1 for size in remaining) else None
