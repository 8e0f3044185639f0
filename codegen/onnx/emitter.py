"""Walks a portable Program node by node and asks each operator's lowering for ONNX nodes.

Holds what lowerings share: values of nodes, sizes, weights, the frame of the batch. Every float is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from ...ir.printer import print_node, symbol_names
from ...ir.program import Program
from ...spec.errors import TargetError
from .frame import Frame
from .graph import BOOL, FLOAT, INT64, OnnxGraph
from .narrow import narrow_nodes
from .stored import StoredWeights

Size = sympy.Expr
Lowered = ir.Value | Size | tuple[Any, ...] | None
# Makes of operands, rows of tokens, the result or results of a node.
RowMaker = Callable[[tuple[ir.Value, ...]], Any]
Lowering = Callable[["Emitter", fx.Node], Lowered]

DTYPES = {
    torch.float32: FLOAT,
    torch.float16: FLOAT,
    torch.bfloat16: FLOAT,
    torch.float64: FLOAT,
    torch.int64: INT64,
    torch.int32: INT64,
    torch.bool: BOOL,
}


@dataclass(slots=True)
class Emitter:
    """State of one export. `shared` holds what several nodes derive from one value, by a name for it;
    `activations` how the inputs of products are rounded, by the name of the codes; `batched` the values
    `[B, S, ...]` that stand behind a value `[T, ...]`, with the dimensions that follow; `narrow` the nodes
    whose values have the wanted rows alone, and `is_narrow` whether one of them is being lowered."""

    program: Program
    graph: OnnxGraph
    frame: Frame
    stored: StoredWeights
    contrib: bool
    activations: Mapping[str, str]
    env: dict[fx.Node, Lowered] = field(default_factory=dict[fx.Node, Lowered])
    shared: dict[tuple[Any, ...], Any] = field(default_factory=dict[tuple[Any, ...], Any])
    names: dict[str, str] = field(default_factory=dict[str, str])
    batched: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict[ir.Value, tuple[int, ...]])
    narrow: frozenset[fx.Node] = frozenset()
    is_narrow: bool = False

    def __post_init__(self) -> None:
        self.names = symbol_names(self.program.graph, self.program.inputs)
        if self.frame.logits != "all":
            self.narrow = narrow_nodes(self.program)

    def value(self, arg: Any) -> ir.Value:
        """The tensor value of a node argument; a weight is taken as float32 or int64."""
        found = self.lowered(arg)
        assert isinstance(found, ir.Value)
        return found

    def optional(self, arg: Any) -> ir.Value | None:
        """As `value`; None stays None."""
        return None if arg is None else self.value(arg)

    def lowered(self, arg: Any) -> Lowered:
        """Whatever a node argument became; of a matrix of all tokens a narrow node reads the wanted rows."""
        if arg.op == "get_attr":
            return self.stored.plain(self.graph, str(arg.target))
        return self.wanted_rows(arg) if self.is_narrow and arg not in self.narrow else self.env[arg]

    def wanted_rows(self, arg: fx.Node) -> ir.Value:
        """The wanted rows of a value of all tokens; where each is the last of its sequence, `[B, 1, ...]`
        stands behind them."""
        value = self.env[arg]
        assert isinstance(value, ir.Value)
        return self.once(("wanted", arg), lambda: self._taken(value, arg.meta["val"].shape[1:]))

    def _taken(self, value: ir.Value, dims: Sequence[Any]) -> ir.Value:
        graph, frame = self.graph, self.frame
        base = graph.base(value)
        if frame.logits == "last" and self.batched.get(base) == tuple(dims):
            return self.joined(frame.last_token(graph, base), dims)
        rows = frame.input(graph, "out_rows")
        if frame.logits != "last" or not all(isinstance(dim, int) for dim in dims):
            return graph.op("Gather", value, rows, axis=0)
        column = frame.made(graph, "last_column", lambda: graph.op("Unsqueeze", rows, graph.ints(1)))
        return self.joined(graph.op("Gather", value, column, axis=0), dims)

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made on the first call with `key`."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    # Sizes

    def size(self, dim: Any) -> Size:
        """An int, a symbolic int, or a node that computed a size, as an expression over T and L."""
        if isinstance(dim, fx.Node):
            found = self.env[dim]
            assert isinstance(found, sympy.Expr)
            return found
        if isinstance(dim, int):
            return sympy.Integer(dim)
        expr = dim.node.expr
        table = {symbol: sympy.Symbol(self.names[str(symbol)]) for symbol in expr.free_symbols}
        return sympy.expand(expr.subs(table))

    def sizes(self, shape: Sequence[Any]) -> tuple[Size, ...]:
        """A whole shape."""
        return tuple(self.size(dim) for dim in shape)

    def shape_of(self, node: fx.Node) -> tuple[Size, ...]:
        """The shape of a node's tensor."""
        return self.sizes(node.meta["val"].shape)

    def scalar(self, size: Size) -> ir.Value:
        """`size` as an int64 vector of one element.

        Raises TargetError for an expression that is no integer polynomial of the step's sizes.
        """
        if size.is_integer and size.is_number:
            return self.graph.ints(int(size))
        if isinstance(size, sympy.Symbol):
            return self.frame.extent(self.graph, size.name)
        if size.is_polynomial() and all(c.is_integer for c in sympy.Poly(size).coeffs()):
            return self.once(("size", size), lambda: self._computed(size))
        raise TargetError(
            "onnx.size_expression",
            f"A value of the model has the size {size}.",
            "The ONNX target writes sizes as integer polynomials of the step's dimensions.",
            "Compile with --target reference, and report the model.",
        )

    def _computed(self, size: Size) -> ir.Value:
        total: ir.Value | None = None
        for powers, factor in sympy.Poly(size).terms():
            term = self.graph.ints(int(factor))
            for symbol, power in zip(sympy.Poly(size).gens, powers, strict=True):
                for _ in range(power):
                    term = self.graph.op("Mul", term, self.scalar(symbol))
            total = term if total is None else self.graph.op("Add", total, term)
        assert total is not None
        return total

    def shape_vector(self, shape: Sequence[Size]) -> ir.Value:
        """A shape as an int64 vector."""
        if all(size.is_number for size in shape):
            return self.graph.ints(*(int(size) for size in shape))
        return self.once(("shape", *shape), lambda: self.graph.op("Concat", *map(self.scalar, shape), axis=0))

    def reshape(self, value: ir.Value, shape: Sequence[Size]) -> ir.Value:
        """`value` in `shape`; one dimension that is not a number is left to ONNX to find."""
        unknown = [index for index, size in enumerate(shape) if not size.is_number]
        if len(unknown) == 1 and 0 not in shape:
            sizes = [-1 if index in unknown else int(size) for index, size in enumerate(shape)]
            return self.graph.reshape(value, self.graph.ints(*sizes))
        return self.graph.reshape(value, self.shape_vector(shape))

    def dtype_of(self, node: fx.Node) -> ir.DataType:
        """The ONNX dtype of a node's tensor."""
        return DTYPES[node.meta["val"].dtype]

    def operand(self, arg: Any, dtype: ir.DataType) -> ir.Value:
        """A tensor, number or size argument of an elementwise operator as a value of `dtype`."""
        if isinstance(arg, fx.Node):
            found = self.lowered(arg)
            if isinstance(found, ir.Value):
                known = self.dtype_of(arg)
                return found if known == dtype else self.graph.cast(found, dtype)
            scalar = self.graph.op("Squeeze", self.scalar(self.size(arg)))
            return scalar if dtype == INT64 else self.graph.cast(scalar, dtype)
        return self.graph.number(arg, dtype)

    # Rows of the batch

    def by_rows(self, node: fx.Node, args: Sequence[Any], make: RowMaker) -> Any:
        """`make` of float operands for which it does not matter how rows are counted: as `[B, S, ...]`, the
        form that attention takes and gives, where every tensor of `args` is there in it, else as `[T, ...]`.
        A number or a vector of weights stays what it is.

        The result (one value, or several where `node` has several) is `[T, ...]` for all others to read.
        """
        plain = [not isinstance(arg, fx.Node) or _is_vector(arg) for arg in args]
        rows = [None if alone else self.rows_of(arg) for arg, alone in zip(args, plain, strict=True)]
        ranks = {len(self.batched[value]) for value in rows if value is not None}
        if len(ranks) != 1 or sum(value is None for value in rows) != sum(plain):
            return make(tuple(self.operand(arg, FLOAT) for arg in args))
        pairs = zip(args, rows, strict=True)
        made = make(tuple(self.operand(arg, FLOAT) if value is None else value for arg, value in pairs))
        meta = node.meta["val"]
        if isinstance(made, tuple):
            return tuple(self.joined(value, one.shape[1:]) for value, one in zip(made, meta, strict=True))
        return self.joined(made, meta.shape[1:])

    def rows_of(self, arg: fx.Node, dtype: ir.DataType = FLOAT) -> ir.Value | None:
        """A tensor `[T, ...]` of `dtype` as `[B, S, ...]`, where there is such a value."""
        value = None if arg.op == "get_attr" else self.lowered(arg)
        if not isinstance(value, ir.Value) or self.dtype_of(arg) != dtype:
            return None
        base, dims = self.graph.base(value), arg.meta["val"].shape[1:]
        is_fixed = all(isinstance(dim, int) for dim in dims)
        return base if is_fixed and self.batched.get(base) == tuple(dims) else None

    def joined(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """`value[B, S, *dims]` as `[T, *dims]`; a reshape that nothing reads is left out of the graph."""
        self.batched[value] = tuple(int(dim) for dim in dims)
        return self.graph.reshape(value, self.graph.ints(-1, *self.batched[value]))

    # The walk

    def run(self, lowerings: dict[str, Lowering]) -> ir.Value:
        """Lower every node; the logits, as `Frame.close` takes them.

        Raises TargetError naming the first node that has no lowering, with the module it comes from.
        """
        if self.contrib:
            self.batched[self.frame.ids] = ()
        for node in self.program.graph.nodes:
            if node.op == "output":
                logits = self.value(node.args[0])
                base = self.graph.base(logits)
                return base if base in self.batched else logits
            if node.op == "placeholder":
                self.env[node] = self.frame.input(self.graph, str(node.target))
            elif node.op == "call_function":
                self.graph.scope, self.is_narrow = scope_of(node, self.graph.scope), node in self.narrow
                self.env[node] = lowering_of(node, lowerings, self.names, self.graph.scope)(self, node)
        raise AssertionError("a program ends in an output")

    def constant(self, values: Any) -> ir.Value:
        """A constant tensor from a numpy array or nested list."""
        return self.graph.constant(np.asarray(values))


def _is_vector(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.meta["val"].dim() < 2


def lowering_of(node: fx.Node, lowerings: dict[str, Lowering], names: dict[str, str], scope: str) -> Lowering:
    """The lowering of one call: of its overload, or of all overloads of its name."""
    name = str(node.target) if isinstance(node.target, OpOverload) else "operator.getitem"
    for key in (name, name.rpartition(".")[0]):
        if key in lowerings:
            return lowerings[key]
    if not isinstance(node.target, OpOverload):
        assert callable(node.target)
        name = f"operator.{node.target.__name__}"
        if name in lowerings:
            return lowerings[name]
    raise TargetError(
        "onnx.no_lowering",
        f"The operator {name} has no ONNX form.",
        f"It comes from {scope or 'the model itself'}: {print_node(node, names)}.",
        "Compile for another target, or add a function to LOWERINGS of a module in codegen/onnx/lower: "
        "docs/design/onnx.md says how.",
    )


def scope_of(node: fx.Node, last: str) -> str:
    """The module that a node belongs to: as traced, else that of a weight it reads, else the last one."""
    if "module" in node.meta:
        return str(node.meta["module"])
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            return str(source.target).rpartition(".")[0]
    return last
