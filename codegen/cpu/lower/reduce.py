"""Reductions and scans over one or more dimensions: each output element in one ascending order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ..emitter import Emitter, Lowering, index_text, outer_loop
from ..unit import pointer
from ..value import Size, Value, c_size, product


def _reduced_dims(node: fx.Node, rank: int) -> list[int]:
    asked: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if asked is None or asked == []:
        return list(range(rank))
    return sorted(dim % rank for dim in ([asked] if isinstance(asked, int) else asked))


def moved_last(value: Value, dims: Sequence[int]) -> Value:
    """A view of `value` with `dims` moved to the end."""
    order = [dim for dim in range(len(value.shape)) if dim not in dims] + list(dims)
    return value.viewed(tuple(value.shape[d] for d in order), tuple(value.strides[d] for d in order))


def _fold(start: str, step: str, finish: str = "acc") -> Lowering:
    """Fold elements `x` into `acc`; `n` is their number."""

    def lower(emitter: Emitter, node: fx.Node) -> Value:
        source = emitter.value(node.args[0])
        dims = _reduced_dims(node, len(source.shape))
        moved = moved_last(source, dims)
        kept = len(source.shape) - len(dims)
        out = emitter.output(node)
        count = product(moved.shape[kept:])
        flat = emitter.reshaped(moved, (*moved.shape[:kept], count), node)
        body = _row_body(flat, start, step, finish, out.ctype)
        function = emitter.unit.function(
            "reduce", [(f"{out.ctype}* __restrict", "o"), (f"const {flat.ctype}*", "a")], body
        )
        emitter.unit.call(emitter.comment(node), function, [pointer(out), pointer(flat)], [flat], [out])
        return out

    return lower


def _row_body(flat: Value, start: str, step: str, finish: str, ctype: str) -> str:
    kept = len(flat.shape) - 1
    names = [f"i{dim}" for dim in range(kept)]
    row = index_text(flat.strides[:kept], names)
    accumulator = "int64_t" if ctype == "int64_t" else "float"
    return "\n".join(
        [
            *outer_loop(flat.shape),
            f"    const int64_t n = {c_size(flat.shape[-1])};",
            f"    const auto* p = a + ({row});",
            f"    {accumulator} acc = {start};",
            "    for (int64_t j = 0; j < n; ++j) {",
            f"      const auto x = p[j*({c_size(flat.strides[-1])})];",
            f"      {step}",
            "    }",
            f"    o[r] = ({ctype})({finish});",
            "  }",
        ]
    )


def along_last(emitter: Emitter, node: fx.Node, source: Value, dim: int, function: str, extra: str) -> Value:
    """Apply `function(out, in, n, stride...)` to every line of `source` along `dim`; out is contiguous.

    The result keeps the shape of the node; lines are written through the strides of its dimension.
    """
    out = emitter.output(node)
    rank = len(source.shape)
    dim %= rank
    lines_in = moved_last(source, [dim])
    lines_out = moved_last(out, [dim])
    names = [f"i{d}" for d in range(rank - 1)]
    step_out, step_in = c_size(lines_out.strides[-1]), c_size(lines_in.strides[-1])
    body = "\n".join(
        [
            *outer_loop(lines_in.shape),
            f"    const auto* p = a + ({index_text(lines_in.strides[:-1], names)});",
            f"    auto* w = o + ({index_text(lines_out.strides[:-1], names)});",
            f"    llmc::{function}(w, {step_out}, p, {step_in}, {c_size(lines_in.shape[-1])}{extra});",
            "  }",
        ]
    )
    name = emitter.unit.function("lines", [(f"{out.ctype}*", "o"), (f"const {source.ctype}*", "a")], body)
    emitter.unit.call(emitter.comment(node), name, [pointer(out), pointer(source)], [source], [out])
    return out


def _lines(function: str) -> Lowering:
    def lower(emitter: Emitter, node: fx.Node) -> Value:
        dim: Any = node.args[1]
        return along_last(emitter, node, emitter.value(node.args[0]), dim, function, "")

    return lower


def _extreme(compare: str, with_index: bool) -> Lowering:
    """max.dim and min.dim (values, indexes), argmax and argmin (indexes): the first of equals."""

    def lower(emitter: Emitter, node: fx.Node) -> Any:
        source = emitter.value(node.args[0])
        asked: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        rank = len(source.shape)
        if asked is None:
            source = emitter.reshaped(source, (product(source.shape),), node)
            asked, rank = 0, 1
        lines = moved_last(source, [asked % rank])
        index = emitter.output(node, 1 if with_index else None)
        outs = [emitter.output(node, 0), index] if with_index else [index]
        names = [f"i{d}" for d in range(rank - 1)]
        store = ["    v[r] = p[best*st];"] if with_index else []
        body = "\n".join(
            [
                *outer_loop(lines.shape),
                f"    const auto* p = a + ({index_text(lines.strides[:-1], names)});",
                f"    const int64_t n = {c_size(lines.shape[-1])}, st = {c_size(lines.strides[-1])};",
                "    int64_t best = 0;",
                f"    for (int64_t j = 1; j < n; ++j) if (p[j*st] {compare} p[best*st]) best = j;",
                *store,
                "    o[r] = best;",
                "  }",
            ]
        )
        parameters = [(f"const {source.ctype}*", "a"), ("int64_t*", "o")]
        arguments = [pointer(source), pointer(index)]
        if with_index:
            parameters.append((f"{source.ctype}*", "v"))
            arguments.append(pointer(outs[0]))
        function = emitter.unit.function("extreme", parameters, body)
        emitter.unit.call(emitter.comment(node), function, arguments, [source], outs)
        return tuple(outs) if with_index else index

    return lower


def _ordered(function: str) -> Lowering:
    """topk and sort: values and indexes, descending or ascending, equals in ascending index order."""

    def lower(emitter: Emitter, node: fx.Node) -> tuple[Value, Value]:
        source = emitter.value(node.args[0])
        rest: dict[str, Any] = _ordering(function, node)
        dim = rest["dim"] % len(source.shape)
        if dim != len(source.shape) - 1:
            raise NotImplementedError("ordering along an inner dimension")
        dense = emitter.contiguous(source, node)
        values, indexes = emitter.output(node, 0), emitter.output(node, 1)
        width, count = dense.shape[-1], values.shape[-1]
        scratch = emitter.buffer(f"{node.name}_order", "int64_t", dense.shape)
        body = "\n".join(
            [
                f"  LLMC_SHARE(r, {c_size(product(dense.shape[:-1]))}) {{",
                f"    const int64_t n = {c_size(width)}, k = {c_size(count)};",
                f"    llmc::order_line(v + r*k, o + r*k, a + r*n, t + r*n, n, k, {rest['descending']});",
                "  }",
            ]
        )
        parameters = [("float*", "v"), ("int64_t*", "o"), ("const float*", "a"), ("int64_t*", "t")]
        name = emitter.unit.function("order", parameters, body)
        arguments = [pointer(value) for value in (values, indexes, dense, scratch)]
        emitter.unit.call(
            emitter.comment(node), name, arguments, [dense, scratch], [values, indexes, scratch]
        )
        return values, indexes

    return lower


def _ordering(function: str, node: fx.Node) -> dict[str, Any]:
    names = ("k", "dim", "largest") if function == "topk" else ("dim", "descending")
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    descending = given.get("largest", True) if function == "topk" else given.get("descending", False)
    return {"dim": given.get("dim", -1), "descending": "true" if descending else "false"}


def _softmax(emitter: Emitter, node: fx.Node) -> Value:
    dim: Any = node.args[1]
    return along_last(emitter, node, emitter.value(node.args[0]), dim, "softmax_line", "")


def _norm(kind: str, has_sum: bool) -> Lowering:
    """aten.layer_norm / aten.rms_norm left generic: normalised over the last dimension."""

    def lower(emitter: Emitter, node: fx.Node) -> Value:
        args: list[Any] = [*node.args, *([None] * (5 - len(node.args)))]
        source = emitter.contiguous(emitter.value(args[0]), node)
        width = product(emitter.symbols.sizes(args[1]))
        weight, bias = args[2], args[3] if has_sum else None
        eps = args[4] if has_sum else args[3]
        operands = [emitter.value(arg) if arg is not None else None for arg in (weight, bias)]
        out = emitter.output(node)
        n, epsilon = c_size(width), float(1e-5 if eps is None else eps)
        body = "\n".join(
            [
                f"  LLMC_SHARE(r, {c_size(sympy.expand(product(source.shape) / width))}) {{",
                f"    llmc::{kind}_line(o + r*({n}), a + r*({n}), w, b, {n}, {epsilon!r}f);",
                "  }",
            ]
        )
        parameters = [("float*", "o"), ("const float*", "a"), ("const float*", "w"), ("const float*", "b")]
        function = emitter.unit.function("norm", parameters, body)
        pointers = ["nullptr" if value is None else pointer(value) for value in operands]
        reads = [source, *(value for value in operands if value is not None)]
        emitter.unit.call(
            emitter.comment(node), function, [pointer(out), pointer(source), *pointers], reads, [out]
        )
        return out

    return lower


def _std(finish: str) -> Lowering:
    """Unbiased variance (or its root) of lines, two passes."""

    def lower(emitter: Emitter, node: fx.Node) -> Value:
        source = emitter.value(node.args[0])
        dims = _reduced_dims(node, len(source.shape))
        moved = moved_last(source, dims)
        kept = len(source.shape) - len(dims)
        count: Size = product(moved.shape[kept:])
        flat = emitter.reshaped(moved, (*moved.shape[:kept], count), node)
        dense = emitter.contiguous(flat, node)
        correction: Any = node.kwargs.get("correction", 1)
        out = emitter.output(node)
        body = "\n".join(
            [
                f"  LLMC_SHARE(r, {c_size(product(dense.shape[:-1]))}) {{",
                f"    const int64_t n = {c_size(count)};",
                f"    const float v = llmc::variance_line(a + r*n, n, {correction});",
                f"    o[r] = {finish};",
                "  }",
            ]
        )
        function = emitter.unit.function("variance", [("float*", "o"), ("const float*", "a")], body)
        emitter.unit.call(emitter.comment(node), function, [pointer(out), pointer(dense)], [dense], [out])
        return out

    return lower


LOWERINGS: dict[str, Lowering] = {
    "aten.sum": _fold("0", "acc += x;"),
    "aten.mean": _fold("0", "acc += x;", "acc / (float)n"),
    "aten.amax": _fold("-INFINITY", "acc = x > acc ? x : acc;"),
    "aten.amin": _fold("INFINITY", "acc = x < acc ? x : acc;"),
    "aten.any": _fold("0", "acc = acc != 0 || x != 0;", "acc != 0"),
    "aten.cumsum": _lines("cumsum_line"),
    "aten.softmax": _softmax,
    "aten._softmax": _softmax,
    "aten.max": _extreme(">", True),
    "aten.min": _extreme("<", True),
    "aten.argmax": _extreme(">", False),
    "aten.topk": _ordered("topk"),
    "aten.sort": _ordered("sort"),
    "aten.layer_norm": _norm("layer_norm", True),
    "aten.rms_norm": _norm("rms_norm", False),
    "aten.var": _std("v"),
    "aten.std": _std("std::sqrt(v)"),
}
