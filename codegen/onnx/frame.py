"""The batch around the model: graph inputs, positions, masks and caches, in ONNX Runtime GenAI's conventions.

`input_ids[B, S]` are the next tokens, `attention_mask[B, N]` has a 1 for every token known, the new ones
included. The model itself sees T = B * S flat tokens. With contrib operators each row's ones come first
(padding is on the right) and caches are buffers that a row's tokens fill from the left; with standard
operators padding may be anywhere and caches are what came before, without room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ...spec.errors import InternalError
from ...spec.model import AttentionSpec, ModelSpec
from .graph import FLOAT, INT32, INT64, OnnxGraph

PAST_KEY, PAST_VALUE = "past_key_values.{}.key", "past_key_values.{}.value"
PRESENT_KEY, PRESENT_VALUE = "present.{}.key", "present.{}.value"


@dataclass(slots=True)
class Cache:
    """The cache of one layer: what came before, and what comes after (None until attention has run)."""

    key: ir.Value
    value: ir.Value
    present: tuple[ir.Value, ir.Value] | None = None


@dataclass(slots=True)
class Frame:
    """Inputs and what derives from them, each made once.

    `logits`: `last` (one row a sequence, of its last token), `all`, or `rows` (those that an input
    `out_rows[L]` lists, of the flat tokens).
    """

    spec: ModelSpec
    contrib: bool
    logits: str
    caches: dict[int, Cache] = field(default_factory=dict[int, Cache])
    _made: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])

    def open(self, graph: OnnxGraph) -> None:
        """Declare the inputs of the graph."""
        self._made["ids"] = graph.input("input_ids", INT64, ("batch_size", "sequence_length"))
        mask_dims = ("batch_size", "total_sequence_length")
        self._made["mask"] = graph.input("attention_mask", INT64, mask_dims)
        if self.logits == "rows":
            self._made["out_rows"] = graph.input("out_rows", INT64, ("num_rows",))
        for layer in self.owners():
            key_dims, value_dims = self.cache_dims(layer)
            index = layer.layer
            self.caches[index] = Cache(
                graph.input(PAST_KEY.format(index), FLOAT, key_dims),
                graph.input(PAST_VALUE.format(index), FLOAT, value_dims),
            )

    def owners(self) -> list[AttentionSpec]:
        """The attention layers that have caches of their own."""
        return [layer for layer in self.spec.attention if layer.kv_source == layer.layer]

    def widths(self, layer: AttentionSpec) -> tuple[int, int]:
        """Widths of cached keys and values: equal, the smaller padded, with contrib operators."""
        if not self.contrib:
            return layer.qk_dim, layer.v_dim
        widest = max(layer.qk_dim, layer.v_dim)
        return widest, widest

    def cache_dims(
        self, layer: AttentionSpec, length: str = "past_sequence_length"
    ) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """The dimensions of a layer's key and value cache."""
        key, value = self.widths(layer)
        dims = ("batch_size", layer.num_kv_heads, length)
        return (*dims, key), (*dims, value)

    def input(self, graph: OnnxGraph, name: str) -> ir.Value:
        """What stands for the program's input `name`."""
        match name:
            case "input_ids":
                return self.made(graph, "flat_ids", lambda: graph.reshape(self._made["ids"], graph.ints(-1)))
            case "positions":
                return self.made(
                    graph, "positions", lambda: graph.reshape(self.row_positions(graph), graph.ints(-1))
                )
            case "out_rows":
                return self._rows(graph)
            case _:
                raise InternalError(
                    "onnx.program_input",
                    f"The program has an input {name!r}.",
                    "The ONNX target takes programs before the lay-out stage.",
                    "Report this with the command that led to it.",
                )

    @property
    def ids(self) -> ir.Value:
        """The new tokens, `[B, S]`."""
        return self._made["ids"]

    def extent(self, graph: OnnxGraph, name: str) -> ir.Value:
        """The size called `name` (T or L) as a vector of one element."""
        source = {"T": "input_ids", "L": "out_rows"}[name]
        return self.made(graph, f"size {name}", lambda: graph.op("Shape", self.input(graph, source)))

    def made(self, graph: OnnxGraph, key: str, make: Any) -> ir.Value:
        """What `make` gives, made once and outside of any layer."""
        if key not in self._made:
            scope, graph.scope = graph.scope, "batch"
            self._made[key] = make()
            graph.scope = scope
        return self._made[key]

    # Sizes and positions

    def batch_shape(self, graph: OnnxGraph) -> ir.Value:
        """`[B, S]`."""
        return self.made(graph, "batch_shape", lambda: graph.op("Shape", self._made["ids"]))

    def split_shape(self, graph: OnnxGraph, *rest: int) -> ir.Value:
        """The shape vector `[B, S, *rest]`."""
        return self.made(
            graph,
            f"split {rest}",
            lambda: graph.op("Concat", self.batch_shape(graph), graph.ints(*rest), axis=0),
        )

    def batch(self, graph: OnnxGraph) -> ir.Value:
        """B, in a vector."""
        return self.made(graph, "B", lambda: graph.op("Shape", self._made["ids"], start=0, end=1))

    def length(self, graph: OnnxGraph) -> ir.Value:
        """S, in a vector."""
        return self.made(graph, "S", lambda: graph.op("Shape", self._made["ids"], start=1, end=2))

    def total(self, graph: OnnxGraph) -> ir.Value:
        """N, in a vector."""
        return self.made(graph, "N", lambda: graph.op("Shape", self._made["mask"], start=1, end=2))

    def known(self, graph: OnnxGraph) -> ir.Value:
        """How many tokens of each row are known, `[B]`."""
        return self.made(
            graph, "known", lambda: graph.op("ReduceSum", self._made["mask"], graph.ints(1), keepdims=0)
        )

    def _last_known(self, graph: OnnxGraph) -> ir.Value:
        return self.made(graph, "last_known", lambda: graph.op("Sub", self.known(graph), graph.ints(1)))

    def row_positions(self, graph: OnnxGraph) -> ir.Value:
        """The position of every new token, `[B, S]`."""
        return self.made(graph, "row_positions", lambda: self._row_positions(graph))

    def _row_positions(self, graph: OnnxGraph) -> ir.Value:
        if not self.contrib:
            start = graph.op("Sub", self.total(graph), self.length(graph))
            return graph.op("Slice", self.key_positions(graph), start, self.total(graph), graph.ints(1))
        past = graph.op("Max", graph.op("Sub", self.known(graph), self.length(graph)), graph.ints(0))
        past = graph.op("Unsqueeze", past, graph.ints(1))
        return graph.op("Add", past, self._count(graph, self.length(graph)))

    def key_positions(self, graph: OnnxGraph) -> ir.Value:
        """The position of every known token, `[B, N]`; at padding, that of the token before it, at least 0.

        With contrib operators column n holds position n in every row: `[1, N]`.
        """
        return self.made(graph, "key_positions", lambda: self._key_positions(graph))

    def _key_positions(self, graph: OnnxGraph) -> ir.Value:
        if self.contrib:
            return graph.op("Unsqueeze", self._count(graph, self.total(graph)), graph.ints(0))
        counted = graph.op("CumSum", self._made["mask"], graph.number(1, INT64))
        return graph.op("Max", graph.op("Sub", counted, graph.ints(1)), graph.ints(0))

    def _count(self, graph: OnnxGraph, stop: ir.Value) -> ir.Value:
        last = graph.op("Squeeze", stop)
        return graph.op("Range", graph.number(0, INT64), last, graph.number(1, INT64))

    def _rows(self, graph: OnnxGraph) -> ir.Value:
        if self.logits == "rows":
            return self._made["out_rows"]
        return self.made(graph, "out_rows", lambda: self._last_rows(graph))

    def _last_rows(self, graph: OnnxGraph) -> ir.Value:
        if self.logits == "all":
            return self._count(graph, graph.op("Shape", self.input(graph, "input_ids")))
        starts = graph.op("Mul", self._count(graph, self.batch(graph)), self.length(graph))
        return graph.op("Add", starts, self._last_columns(graph))

    def _last_columns(self, graph: OnnxGraph) -> ir.Value:
        """The column of the last new token of each row: `[B]`, or `[1]` where it is the same in all."""

        def make() -> ir.Value:
            last = graph.op("Sub", self.length(graph), graph.ints(1))
            return graph.op("Min", self._last_known(graph), last) if self.contrib else last

        return self.made(graph, "last_columns", make)

    def last_token(self, graph: OnnxGraph, value: ir.Value) -> ir.Value:
        """Of `value[B, S, ...]` the last new token of each row: `[B, 1, ...]`. With contrib operators."""

        def make() -> ir.Value:
            return graph.op("Unsqueeze", self._last_columns(graph), graph.ints(1, 2))

        return graph.op("GatherND", value, self.made(graph, "last_token", make), batch_dims=1)

    # What the attention operators take

    def last_key(self, graph: OnnxGraph) -> ir.Value:
        """Tokens known of each row less one, `int32[B]`: `seqlens_k` of GroupQueryAttention."""
        return self.made(graph, "last_key", lambda: graph.cast(self._last_known(graph), INT32))

    def total_scalar(self, graph: OnnxGraph) -> ir.Value:
        """N as an int32 scalar."""
        return self.made(graph, "total", lambda: graph.cast(graph.op("Squeeze", self.total(graph)), INT32))

    def visible(self, graph: OnnxGraph, window: int, chunk: int) -> ir.Value:
        """Which known tokens each new one may attend to: bool `[B, 1, S, N]`."""
        return self.made(graph, f"visible {window} {chunk}", lambda: self._visible(graph, window, chunk))

    def _visible(self, graph: OnnxGraph, window: int, chunk: int) -> ir.Value:
        query = graph.op("Unsqueeze", self.row_positions(graph), graph.ints(1, 3))
        key = graph.op("Unsqueeze", self.key_positions(graph), graph.ints(1, 2))
        seen = graph.op("LessOrEqual", key, query)
        if not self.contrib:
            known = graph.op("Unsqueeze", graph.cast(self._made["mask"], ir.DataType.BOOL), graph.ints(1, 2))
            seen = graph.op("And", seen, graph.op("And", known, self._comes_before(graph)))
        if window:
            oldest = graph.op("Sub", query, graph.ints(window))
            seen = graph.op("And", seen, graph.op("Greater", key, oldest))
        if chunk:
            size = graph.ints(chunk)
            same = graph.op("Equal", graph.op("Div", key, size), graph.op("Div", query, size))
            seen = graph.op("And", seen, same)
        return seen

    def _comes_before(self, graph: OnnxGraph) -> ir.Value:
        """Column n is not behind that of new token s (padding repeats positions): bool `[1, 1, S, N]`."""
        past = graph.op("Sub", self.total(graph), self.length(graph))
        column = graph.op("Add", past, self._count(graph, self.length(graph)))
        column = graph.op("Unsqueeze", column, graph.ints(0, 1, 3))
        key = graph.op("Unsqueeze", self._count(graph, self.total(graph)), graph.ints(0, 1, 2))
        return graph.op("LessOrEqual", key, column)

    def bias(self, graph: OnnxGraph, window: int, chunk: int) -> ir.Value:
        """`visible` as what is added to scores: 0 or the lowest float32."""

        def make() -> ir.Value:
            lowest = graph.number(float(np.finfo(np.float32).min))
            return graph.op("Where", self.visible(graph, window, chunk), graph.number(0.0), lowest)

        return self.made(graph, f"bias {window} {chunk}", make)

    # What comes out

    def close(self, graph: OnnxGraph, logits: ir.Value, is_batched: bool) -> list[ir.Value]:
        """The outputs: logits `[B, 1 or S, vocab]` (of `rows`: `[L, vocab]`), then the caches. Of flat logits
        the shape is made here; a reshape in front of an output is a copy."""
        graph.scope = ""
        vocab = self.spec.vocab_size
        dims: tuple[int | str, ...] = ("num_rows", vocab)
        if self.logits == "last":
            shape, dims = graph.ints(-1, 1, vocab), ("batch_size", 1, vocab)
            logits = logits if is_batched else graph.reshape(logits, shape)
        elif self.logits == "all":
            dims = ("batch_size", "sequence_length", vocab)
            logits = logits if is_batched else graph.reshape(logits, self.split_shape(graph, vocab))
        outputs = [_named(graph, logits, "logits", FLOAT, dims)]
        for layer in self.owners():
            present = self.caches[layer.layer].present
            assert present is not None, "every owning layer writes its cache"
            shapes = self.cache_dims(layer, "total_sequence_length")
            for value, pattern, shape in zip(present, (PRESENT_KEY, PRESENT_VALUE), shapes, strict=True):
                value.name = pattern.format(layer.layer)
                value.dtype, value.shape = FLOAT, ir.Shape(shape)
                outputs.append(value)
        return outputs


def _named(
    graph: OnnxGraph, value: ir.Value, name: str, dtype: ir.DataType, dims: tuple[int | str, ...]
) -> ir.Value:
    """`value` as an output of the graph called `name`."""
    if value.producer() is None or value.is_graph_input():
        value = graph.op("Identity", value)
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(dims)
    return value
