"""Attention over the caches of the batch: GroupQueryAttention, or the standard Attention with a mask."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import onnx_ir as ir
from torch import fx

from ....ir.arguments import argument
from ..emitter import Emitter, Lowering
from ..frame import Cache
from ..graph import MICROSOFT
from .grouped import Rotary, packed_source, rotary_of
from .rope import position_tables


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `llmc.attention` node."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    sinks: fx.Node | None
    kv_source: int
    scale: float
    window: int
    softcap: float
    chunk: int

    @staticmethod
    def of(node: fx.Node) -> _Call:
        """Those of `node`."""
        return _Call(**{field.name: argument(node, field.name) for field in fields(_Call)})

    @property
    def heads(self) -> int:
        """Query heads."""
        return _size(self.q, 1)

    @property
    def groups(self) -> int:
        """KV heads."""
        return _size(self.k, 1)

    @property
    def qk_dim(self) -> int:
        """Width of queries and keys."""
        return _size(self.q, 2)

    @property
    def v_dim(self) -> int:
        """Width of values."""
        return _size(self.v, 2)


def _size(node: fx.Node, dim: int) -> int:
    return int(node.meta["val"].shape[dim])


def _attention(emitter: Emitter, node: fx.Node) -> ir.Value:
    call = _Call.of(node)
    cache = emitter.frame.caches[call.kv_source]
    out = _grouped(emitter, call, cache) if emitter.contrib else _standard(emitter, call, cache)
    return emitter.graph.reshape(out, emitter.graph.ints(-1, call.heads, call.v_dim))


def _flat(emitter: Emitter, arg: Any, width: int) -> ir.Value:
    """`[T, heads, D]` as `[B, S, heads * width]`, each head filled up with zeros."""
    graph, value = emitter.graph, emitter.value(arg)
    heads, own = (int(dim) for dim in arg.meta["val"].shape[1:])
    if own < width:
        value = graph.op("Pad", value, graph.ints(0, width - own), graph.number(0.0), graph.ints(2))
    elif emitter.batched.get(graph.base(value)) == (heads * width,):
        return graph.base(value)
    return graph.reshape(value, emitter.frame.split_shape(graph, heads * width))


def _grouped(emitter: Emitter, call: _Call, cache: Cache) -> ir.Value:
    """GroupQueryAttention appends to the cache and attends. A layer that reads another's cache is given that
    layer's keys and values again, and what it appends goes nowhere."""
    graph, frame = emitter.graph, emitter.frame
    width = max(call.qk_dim, call.v_dim)
    bias = frame.bias(graph, 0, call.chunk) if call.chunk else None
    rotary = rotary_of(call.q, call.k, emitter.program.spec) if width == call.qk_dim else None
    tables = (None, None) if rotary is None else position_tables(emitter, rotary.inv_freq, rotary.scale)
    inputs = (
        *_queries_keys_values(emitter, call, rotary, width),
        cache.key, cache.value, frame.last_key(graph), frame.total_scalar(graph),
        *tables, None, bias, emitter.optional(call.sinks),
    )  # fmt: skip
    out, key, value = graph.ops(
        "GroupQueryAttention", inputs, 3, domain=MICROSOFT,
        num_heads=call.heads, kv_num_heads=call.groups, scale=call.scale,
        softcap=call.softcap or None, local_window_size=call.window or None,
        do_rotary=None if rotary is None else 1,
        rotary_interleaved=1 if rotary is not None and rotary.style == "interleaved" else None,
    )  # fmt: skip
    if cache.present is None:
        cache.present = (key, value)
    if call.v_dim == width:
        return emitter.joined(out, (call.heads * width,))
    wide = graph.reshape(out, graph.ints(-1, call.heads, width))
    return graph.op("Slice", wide, graph.ints(0), graph.ints(call.v_dim), graph.ints(2))


def _queries_keys_values(
    emitter: Emitter, call: _Call, rotary: Rotary | None, width: int
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Q, K and V before `rotary`, each `[B, S, heads * width]`; packed into the first where they lie so."""
    q, k = (call.q, call.k) if rotary is None else (rotary.q, rotary.k)
    source = packed_source(q, k, call.v) if call.qk_dim == call.v_dim else None
    if source is None:
        query, key, value = (_flat(emitter, arg, width) for arg in (q, k, call.v))
        return query, key, value
    batched = emitter.rows_of(source)
    if batched is None:
        shape = emitter.frame.split_shape(emitter.graph, (call.heads + 2 * call.groups) * width)
        batched = emitter.graph.reshape(emitter.value(source), shape)
    return batched, None, None


def _standard(emitter: Emitter, call: _Call, cache: Cache) -> ir.Value:
    graph, frame = emitter.graph, emitter.frame
    if cache.present is None:
        cache.present = tuple(
            graph.op("Concat", past, _heads(emitter, arg), axis=2)
            for past, arg in ((cache.key, call.k), (cache.value, call.v))
        )  # pyright: ignore[reportAttributeAccessIssue]
    key, value = cache.present  # pyright: ignore[reportGeneralTypeIssues]
    query = _heads(emitter, call.q)
    if call.sinks is None:
        bias = frame.bias(graph, call.window, call.chunk)
        out = graph.op("Attention", query, key, value, bias, scale=call.scale, softcap=call.softcap or None)
    else:
        out = _with_sinks(emitter, call, query, key, value)
    return graph.op("Transpose", out, perm=[0, 2, 1, 3])


def _heads(emitter: Emitter, arg: Any) -> ir.Value:
    """`[T, heads, D]` as `[B, heads, S, D]`."""
    heads, width = (int(dim) for dim in arg.meta["val"].shape[1:])
    graph = emitter.graph
    split = graph.reshape(emitter.value(arg), emitter.frame.split_shape(graph, heads, width))
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _with_sinks(emitter: Emitter, call: _Call, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
    """Attention with one more logit a head that carries no value: the standard operator has none."""
    graph, frame = emitter.graph, emitter.frame
    repeats = call.heads // call.groups
    shape = graph.op("Concat", frame.batch(graph), graph.ints(call.groups, repeats, -1, call.qk_dim), axis=0)
    rows = graph.reshape(query, shape)
    columns = graph.op("Transpose", graph.op("Unsqueeze", key, graph.ints(2)), perm=[0, 1, 2, 4, 3])
    scores = graph.op("Mul", graph.op("MatMul", rows, columns), graph.number(call.scale))
    bias = graph.op("Unsqueeze", frame.bias(graph, call.window, call.chunk), graph.ints(1))
    scores = graph.op("Add", scores, bias)
    sinks = graph.reshape(emitter.value(call.sinks), graph.ints(1, call.groups, repeats, 1, 1))
    width = graph.op("Shape", scores)
    column = graph.op("Concat", graph.op("Slice", width, graph.ints(0), graph.ints(4)), graph.ints(1), axis=0)
    logits = graph.op("Concat", scores, graph.op("Expand", sinks, column), axis=-1)
    shares = graph.op("Softmax", logits, axis=-1)
    shares = graph.op("Slice", shares, graph.ints(0), frame.total(graph), graph.ints(4))
    mixed = graph.op("MatMul", shares, graph.op("Unsqueeze", value, graph.ints(2)))
    back = graph.op("Concat", frame.batch(graph), graph.ints(call.heads, -1, call.v_dim), axis=0)
    return graph.reshape(mixed, back)


LOWERINGS: dict[str, Lowering] = {"llmc.attention": _attention}
