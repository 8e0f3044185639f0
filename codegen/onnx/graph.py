"""An ONNX graph in the making: nodes with scoped names, constants, weights in external files. Knows ONNX and
nothing of programs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ... import __version__

MICROSOFT = "com.microsoft"
# The oldest that hold everything emitted here: attention, rotary embedding and RMS norm came with opset 23.
OPSET = 23
IR_VERSION = 11
PRODUCER = "llmc"

FLOAT, INT64, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
Dims = Sequence[int | str]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of a weight lie: `length` bytes from `offset` of file `path` of the model's folder."""

    path: str
    offset: int
    length: int

    def rows(self, rows: range, count: int) -> StoredTensor:
        """Where consecutive `rows` of it lie, of `count` in all."""
        each = self.length // count
        return StoredTensor(self.path, self.offset + rows.start * each, len(rows) * each)


@dataclass(slots=True)
class OnnxGraph:
    """Nodes in the order they were added. Not thread-safe.

    `scope` is the module that nodes are being made for; names of nodes and values begin with it, so that
    viewers can fold layers.
    """

    scope: str = ""
    inputs: list[ir.Value] = field(default_factory=list[ir.Value])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    initializers: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    _constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(
        default_factory=dict[tuple[str, tuple[int, ...], bytes], ir.Value]
    )
    _casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(
        default_factory=dict[tuple[ir.Value, ir.DataType], ir.Value]
    )
    _counts: dict[str, int] = field(default_factory=dict[str, int])
    _viewed: dict[ir.Value, ir.Value] = field(default_factory=dict[ir.Value, ir.Value])

    def input(self, name: str, dtype: ir.DataType, dims: Dims) -> ir.Value:
        """A new input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
        self.inputs.append(value)
        return value

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output. Attributes that are None are left out."""
        return self.ops(kind, inputs, 1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], count: int, *, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """A node with `count` outputs. A trailing input that is None is left out."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        name = self._name(kind)
        suffixes = [""] if count == 1 else [f"_{index}" for index in range(count)]
        outputs = [ir.Value(name=f"{name}/output{suffix}") for suffix in suffixes]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(
            ir.Node(domain, kind, given, ir.convenience.convert_attributes(kept), outputs=outputs, name=name)
        )
        return tuple(outputs)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """A small tensor inside the model file; equal ones are one."""
        array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constants/{len(self._constants)}"
            self._constants[key] = self._initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def number(self, value: float | int | bool, dtype: ir.DataType = FLOAT) -> ir.Value:
        """A scalar."""
        return self.constant(np.asarray(value, dtype=dtype.numpy()))

    def weight(self, name: str, dtype: ir.DataType, shape: Sequence[int], stored: StoredTensor) -> ir.Value:
        """A tensor of the model's external data; asked for again under one name, it is the same."""
        if name not in self.initializers:
            tensor = ir.ExternalTensor(
                stored.path, stored.offset, stored.length, dtype, shape=ir.Shape(shape), name=name
            )
            self._initializer(tensor)
        return self.initializers[name]

    def reshape(self, value: ir.Value, shape: ir.Value) -> ir.Value:
        """`value` in another shape; of a reshaped value the original is taken."""
        base = self.base(value)
        result = self.op("Reshape", base, shape)
        self._viewed[result] = base
        return result

    def base(self, value: ir.Value) -> ir.Value:
        """What `value` is a reshape of; itself where it is none."""
        return self._viewed.get(value, value)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` converted."""
        return self.op("Cast", value, to=int(dtype))

    def cached_cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`cast` of an initializer, made once."""
        key = (value, dtype)
        if key not in self._casts:
            scope, self.scope = self.scope, "weights"
            self._casts[key] = self.cast(value, dtype)
            self.scope = scope
        return self._casts[key]

    @contextmanager
    def body(self) -> Generator[list[ir.Node], None, None]:
        """Nodes made within go to the yielded list, for a subgraph, instead of to the graph."""
        outer, self.nodes = self.nodes, []
        viewed, self._viewed = self._viewed, {}
        try:
            yield self.nodes
        finally:
            self.nodes, self._viewed = outer, viewed

    def finish(self, outputs: Sequence[ir.Value], name: str, metadata: Mapping[str, str]) -> ir.Model:
        """The model: only what the outputs need, constants and weights included."""
        needed, used = _needed(self.nodes, outputs)
        kept = [value for value in self.initializers.values() if value in used]
        # Where operators beyond the standard are used at all, attention is one.
        has_contrib = any(node.domain == MICROSOFT for node in needed)
        imports = {"": OPSET, **({MICROSOFT: 1} if has_contrib else {})}
        graph = ir.Graph(
            self.inputs, outputs, nodes=needed, initializers=kept,
            opset_imports=imports, name=name,
        )  # fmt: skip
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name=PRODUCER,
            producer_version=__version__,
            metadata_props=dict(sorted(metadata.items())),
        )

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape([dim for dim in tensor.shape if isinstance(dim, int)]),
            const_value=tensor,
        )
        self.initializers[str(tensor.name)] = value
        return value

    def _name(self, kind: str) -> str:
        stem = "/" + "/".join([*filter(None, self.scope.split(".")), kind])
        count = self._counts[stem] = self._counts.get(stem, -1) + 1
        return f"{stem}_{count}" if count else stem


def _needed(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that `outputs` depend on, in order, and every value those nodes or their subgraphs read."""
    used: set[ir.Value] = set(outputs)
    needed: list[ir.Node] = []
    for node in reversed(nodes):
        if any(output in used for output in node.outputs):
            needed.append(node)
            used.update(_read_by(node))
    return needed[::-1], used


def _read_by(node: ir.Node) -> set[ir.Value]:
    read = {value for value in node.inputs if value is not None}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            read.update(*[_read_by(inner) for inner in body], body.outputs)
    return read
