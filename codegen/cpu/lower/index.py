"""Gathering, scattering, joining, and the dense products that stayed generic."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from ..emitter import Emitter, Lowering, broadcast_strides, index_text, outer_loop
from ..unit import pointer
from ..value import Size, Value, c_size, product
from .elementwise import literal


def _join(emitter: Emitter, out: Value, parts: list[Value], dim: int, comment: str) -> Value:
    start: Size = sympy.Integer(0)
    for index, part in enumerate(parts):
        region = out.viewed(part.shape, out.strides, start * out.strides[dim])
        _copy(emitter, region, part, f"{comment} (part {index})")
        start = start + part.shape[dim]
    return out


def _copy(emitter: Emitter, region: Value, part: Value, comment: str) -> None:
    names = [f"i{d}" for d in range(len(part.shape))]
    last = len(names) - 1
    body = "\n".join(
        [
            *outer_loop(part.shape),
            f"    for (int64_t i{last} = 0; i{last} < {c_size(part.shape[-1])}; ++i{last})",
            f"      o[{index_text(region.strides, names)}] = a[{index_text(part.strides, names)}];",
            "  }",
        ]
    )
    function = emitter.unit.function(
        "copy", [(f"{region.ctype}* __restrict", "o"), (f"const {part.ctype}*", "a")], body
    )
    emitter.unit.call(comment, function, [pointer(region), pointer(part)], [part], [region])


def _cat(emitter: Emitter, node: fx.Node) -> Value:
    sources: Any = node.args[0]
    parts = [emitter.value(source) for source in sources]
    parts = [part for part in parts if part.shape != (sympy.Integer(0),)]
    asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    out = emitter.output(node)
    return _join(emitter, out, parts, asked % len(out.shape), emitter.comment(node))


def _stack(emitter: Emitter, node: fx.Node) -> Value:
    sources: Any = node.args[0]
    asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    out = emitter.output(node)
    dim = asked % len(out.shape)
    parts = [_with_dim(emitter.value(source), dim) for source in sources]
    return _join(emitter, out, parts, dim, emitter.comment(node))


def _with_dim(value: Value, dim: int) -> Value:
    one = sympy.Integer(1)
    shape = (*value.shape[:dim], one, *value.shape[dim:])
    return value.viewed(shape, (*value.strides[:dim], one, *value.strides[dim:]))


def _lookup(emitter: Emitter, node: fx.Node, source: Value, dim: int, index: Value, aligned: bool) -> Value:
    """`out[..., j, ...] = source[..., index, ...]`: gather when `aligned` (index has out's shape)."""
    out = emitter.output(node)
    names = [f"i{d}" for d in range(len(out.shape))]
    last = len(names) - 1
    if aligned:
        where = f"x[{index_text(index.strides, names)}]"
        source_names = list(names)
    else:
        span = len(index.shape)
        where = f"x[{index_text(index.strides, names[dim : dim + span])}]"
        source_names = [*names[:dim], "", *names[dim + span :]]
    source_names[dim] = "at"
    width = c_size(out.shape[-1])
    body = "\n".join(
        [
            *outer_loop(out.shape),
            f"    for (int64_t i{last} = 0; i{last} < {width}; ++i{last}) {{",
            f"      int64_t at = {where}; if (at < 0) at += {c_size(source.shape[dim])};",
            f"      o[r*({width}) + i{last}] = a[{index_text(source.strides, source_names)}];",
            "    }",
            "  }",
        ]
    )
    parameters = [(f"{out.ctype}* __restrict", "o"), (f"const {source.ctype}*", "a"), ("const int64_t*", "x")]
    function = emitter.unit.function("lookup", parameters, body)
    arguments = [pointer(value) for value in (out, source, index)]
    emitter.unit.call(emitter.comment(node), function, arguments, [source, index], [out])
    return out


def _gather(emitter: Emitter, node: fx.Node) -> Value:
    source, index = emitter.value(node.args[0]), emitter.value(node.args[2])
    dim: Any = node.args[1]
    return _lookup(emitter, node, source, dim % len(source.shape), index, aligned=True)


def _index_select(emitter: Emitter, node: fx.Node) -> Value:
    source, index = emitter.value(node.args[0]), emitter.value(node.args[2])
    dim: Any = node.args[1]
    return _lookup(emitter, node, source, dim % len(source.shape), index, aligned=False)


def _gather_rows(emitter: Emitter, node: fx.Node) -> Value:
    source, index = emitter.value(node.args[0]), emitter.value(node.args[1])
    return _lookup(emitter, node, source, 0, index, aligned=False)


def _embedding(emitter: Emitter, node: fx.Node) -> Value:
    table, ids = emitter.value(node.args[0]), emitter.value(node.args[1])
    return _lookup(emitter, node, table, 0, ids, aligned=False)


def _index(emitter: Emitter, node: fx.Node) -> Value:
    source = emitter.value(node.args[0])
    indexes: Any = node.args[1]
    given = [(dim, index) for dim, index in enumerate(indexes) if index is not None]
    if len(given) != 1:
        raise NotImplementedError("indexing by several tensors")
    dim, index = given[0]
    return _lookup(emitter, node, source, dim, emitter.value(index), aligned=False)


def _region_scatter(emitter: Emitter, node: fx.Node) -> Value:
    """slice_scatter and select_scatter: source with a region of it replaced."""
    source, part = emitter.value(node.args[0]), emitter.value(node.args[1])
    args: list[Any] = [*node.args[2:], *([None] * (6 - len(node.args)))]
    dim = (args[0] or 0) % len(source.shape)
    start = emitter.size(args[1] or 0)
    start = start + source.shape[dim] if start.is_negative else start
    out = emitter.output(node)
    emitter.loop(emitter.comment(node) + " (copy)", out, [source], "{0}")
    strides = list(out.strides)
    if "select" in str(node.target):
        part = _with_dim(part, dim)
    else:
        strides[dim] = strides[dim] * (args[3] or 1)
    region = out.viewed(part.shape, tuple(strides), start * out.strides[dim])
    _copy(emitter, region, part, emitter.comment(node))
    return out


def _scatter(emitter: Emitter, node: fx.Node) -> Value:
    """out = source with `out[..., index, ...] = value`, line by line in ascending order."""
    source, index = emitter.value(node.args[0]), emitter.value(node.args[2])
    asked: Any = node.args[1]
    dim = asked % len(source.shape)
    constant = not isinstance(node.args[3], fx.Node)
    out = emitter.output(node)
    emitter.loop(emitter.comment(node) + " (copy)", out, [source], "{0}")
    names = [f"i{d}" for d in range(len(index.shape))]
    lines = [name for d, name in enumerate(names) if d != dim]
    shape = tuple(size for d, size in enumerate(index.shape) if d != dim)
    value = None if constant else emitter.value(node.args[3])
    written: Any = node.args[3]
    text = literal(written) if value is None else f"v[{index_text(value.strides, names)}]"
    target = [("at" if d == dim else name) for d, name in enumerate(names)]
    line = names[dim]
    renamed = {f"i{d}": name for d, name in enumerate(lines)}
    body = "\n".join(
        [
            *(_rename(text_line, renamed) for text_line in outer_loop((*shape, sympy.Integer(1)))),
            f"    for (int64_t {line} = 0; {line} < {c_size(index.shape[dim])}; ++{line}) {{",
            f"      const int64_t at = x[{index_text(index.strides, names)}];",
            f"      o[{index_text(out.strides, target)}] = {text};",
            "    }",
            "  }",
        ]
    )
    parameters = [(f"{out.ctype}*", "o"), ("const int64_t*", "x")]
    arguments = [pointer(out), pointer(index)]
    if value is not None:
        parameters.append((f"const {value.ctype}*", "v"))
        arguments.append(pointer(value))
    function = emitter.unit.function("scatter", parameters, body)
    reads = [out, index, *([value] if value is not None else [])]
    emitter.unit.call(emitter.comment(node), function, arguments, reads, [out])
    return out


def _rename(line: str, names: dict[str, str]) -> str:
    for old, new in sorted(names.items(), reverse=True):
        line = line.replace(f" {old} =", f" {new} =")
    return line


def _product(emitter: Emitter, node: fx.Node) -> Value:
    """matmul, mm and bmm over strided operands, K ascending in float32."""
    left, right = emitter.value(node.args[0]), emitter.value(node.args[1])
    return dense_product(emitter, node, left, right, None)


def dense_product(emitter: Emitter, node: fx.Node, left: Value, right: Value, bias: Value | None) -> Value:
    """`left[..., M, K] @ right[..., K, N] (+ bias)`, batch dimensions broadcast."""
    out = emitter.output(node)
    inner = left.shape[-1]
    left = (
        left
        if len(left.shape) > 1
        else left.viewed((sympy.Integer(1), inner), (sympy.Integer(0), *left.strides))
    )
    names = [f"i{d}" for d in range(len(out.shape))]
    batch = out.shape[:-2]
    l_strides = broadcast_strides(left, (*batch, out.shape[-2], inner))
    r_strides = broadcast_strides(right, (*batch, inner, out.shape[-1]))
    last = len(names) - 1
    k_left, k_right = c_size(l_strides[-1]), c_size(r_strides[-2])
    l_index = index_text(l_strides[:-1], names[:last])
    r_index = index_text((*r_strides[:-2], r_strides[-1]), [*names[: last - 1], names[last]])
    start = "0" if bias is None else f"b[{index_text(broadcast_strides(bias, out.shape), names)}]"
    body = "\n".join(
        [
            *outer_loop(out.shape),
            f"    for (int64_t i{last} = 0; i{last} < {c_size(out.shape[-1])}; ++i{last}) {{",
            "      float acc = 0;",
            f"      for (int64_t k = 0; k < {c_size(inner)}; ++k)",
            f"        acc += a[{l_index} + k*({k_left})] * w[{r_index} + k*({k_right})];",
            f"      o[r*({c_size(out.shape[-1])}) + i{last}] = acc + {start};",
            "    }",
            "  }",
        ]
    )
    parameters = [("float* __restrict", "o"), ("const float*", "a"), ("const float*", "w")]
    operands = [left, right]
    if bias is not None:
        parameters.append(("const float*", "b"))
        operands.append(bias)
    function = emitter.unit.function("product", parameters, body)
    arguments = [pointer(value) for value in (out, *operands)]
    emitter.unit.call(emitter.comment(node), function, arguments, operands, [out])
    return out


def _addmm(emitter: Emitter, node: fx.Node) -> Value:
    bias, left, right = (emitter.value(arg) for arg in node.args[:3])
    return dense_product(emitter, node, left, right, bias)


def _linear(emitter: Emitter, node: fx.Node) -> Value:
    left, weight = emitter.value(node.args[0]), emitter.value(node.args[1])
    bias = emitter.value(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
    right = weight.viewed(weight.shape[::-1], weight.strides[::-1])
    return dense_product(emitter, node, left, right, bias)


def _one_hot(emitter: Emitter, node: fx.Node) -> Value:
    index, out = emitter.value(node.args[0]), emitter.output(node)
    column = index.viewed((*index.shape, sympy.Integer(1)), (*index.strides, sympy.Integer(0)))
    emitter.loop(emitter.comment(node), out, [column], "{0} == {i" + str(len(out.shape) - 1) + "}")
    return out


def _repeat(emitter: Emitter, node: fx.Node) -> Value:
    """repeat: every dimension tiled; the source is read modulo its size."""
    source, out = emitter.value(node.args[0]), emitter.output(node)
    missing = len(out.shape) - len(source.shape)
    terms = [
        f"({{i{dim + missing}}} % ({c_size(size)}))*({c_size(stride)})"
        for dim, (size, stride) in enumerate(zip(source.shape, source.strides, strict=True))
    ]
    return _computed_read(emitter, node, source, out, " + ".join(terms) or "0")


def _repeat_interleave(emitter: Emitter, node: fx.Node) -> Value:
    source, out = emitter.value(node.args[0]), emitter.output(node)
    asked: Any = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    dim = asked % len(source.shape)
    times = sympy.expand(out.shape[dim] / source.shape[dim])
    names = [f"{{i{d}}}" for d in range(len(out.shape))]
    names[dim] = f"({names[dim]} / ({c_size(times)}))"
    return _computed_read(emitter, node, source, out, index_text(source.strides, names))


def _computed_read(emitter: Emitter, node: fx.Node, source: Value, out: Value, index: str) -> Value:
    flat = source.viewed((product(source.shape),), (sympy.Integer(0),))
    body_operand = Value(flat.base, flat.ctype, (), (), flat.offset)
    emitter.loop(emitter.comment(node), out, [body_operand], "(&{0})[" + index + "]")
    return out


LOWERINGS: dict[str, Lowering] = {
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.gather": _gather,
    "aten.index_select": _index_select,
    "aten.index": _index,
    "aten.embedding": _embedding,
    "llmc.gather_rows": _gather_rows,
    "aten.scatter": _scatter,
    **dict.fromkeys(("aten.slice_scatter", "aten.select_scatter"), _region_scatter),
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.matmul"), _product),
    "aten.addmm": _addmm,
    "aten.linear": _linear,
    "aten.one_hot": _one_hot,
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
}
