"""Rope, cache writes and paged attention by tuned kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ....spec.errors import TargetError
from ..emitter import Emitter, Lowering
from ..unit import pointer
from ..value import Size, Value, c_size
from .elementwise import literal

_ROPES = {
    "half": "kHalf",
    "interleaved": "kInterleaved",
    "interleaved_to_half": "kInterleavedToHalf",
}
_CHUNK_TOKENS = 16


def _heads_dense(emitter: Emitter, value: Value, node: fx.Node) -> Value:
    """`value [T, H, D]` with the heads of a row one after the other; rows may have any stride."""
    dense = value.strides[2] == 1 and (value.shape[1] == 1 or value.strides[1] == value.shape[2])
    return value if dense else emitter.contiguous(value, node)


def _angles(emitter: Emitter, node: fx.Node, rest: Sequence[Any]) -> Value:
    """cos and sin of a step, once for all layers with these frequencies."""
    positions, inv_freq = emitter.value(rest[0]), emitter.value(rest[1])
    key = (inv_freq, f"angles {float(rest[2])!r}")
    if key not in emitter.shared:
        pairs = inv_freq.shape[0]
        rows = positions.shape[0]
        table = emitter.buffer(f"{node.name}_angles", "float", (rows, 2 * pairs))
        call = (
            f"llmc::rope_table(tid, nt, p, {c_size(rows)}, f, {c_size(pairs)}, {literal(float(rest[2]))}, o)"
        )
        parameters = [("float*", "o"), ("const int64_t*", "p"), ("const float*", "f")]
        function = emitter.unit.function("rope_table", parameters, f"  {call};")
        arguments = [pointer(table), pointer(positions), pointer(inv_freq)]
        emitter.unit.call(
            f"angles of {node.name} and its like", function, arguments, [positions, inv_freq], [table]
        )
        emitter.shared[key] = table
    return emitter.shared[key]


def _rotate(emitter: Emitter, node: fx.Node, arg: Any, out: Value, rest: Sequence[Any]) -> Value:
    """`out` = the heads of `arg`, rotated; `rest` = positions, inv_freq, scale, style, tail."""
    x, table = _heads_dense(emitter, emitter.value(arg), node), _angles(emitter, node, rest)
    rows, heads, width = x.shape
    pairs = c_size(table.shape[1] / 2)
    row = c_size(heads * width)
    kind = f"llmc::Rope::{_ROPES[str(rest[3])]}"
    tail = "true" if rest[4] else "false"
    sizes = f"{c_size(heads)}, {c_size(width)}, {pairs}"
    body = "\n".join(
        [
            f"  LLMC_SHARE(t, {c_size(rows)}) {{",
            f"    std::memcpy(o + t*{row}, x + t*({c_size(x.strides[0])}), {row}*sizeof(float));",
            f"    llmc::rope_heads<{kind}>(o + t*{row}, a + t*2*{pairs}, {sizes}, {tail});",
            "  }",
        ]
    )
    function = emitter.unit.function(
        "rope", [("float*", "o"), ("const float*", "x"), ("const float*", "a")], body
    )
    emitter.unit.call(
        emitter.comment(node), function, [pointer(out), pointer(x), pointer(table)], [x, table], [out]
    )
    return out


def _rope(emitter: Emitter, node: fx.Node) -> Value:
    return _rotate(emitter, node, node.args[0], emitter.output(node), node.args[1:])


def _write(emitter: Emitter, node: fx.Node, k: Value, v: Value, caches: Sequence[Any], slots: Value) -> Value:
    k, v = _heads_dense(emitter, k, node), _heads_dense(emitter, v, node)
    k_cache, v_cache = (emitter.value(arg) for arg in caches)
    page, heads = _page_tokens(k_cache), k_cache.shape[2]
    shape = f"llmc::CacheShape<{k_cache.ctype}> shape{{{c_size(heads)}, {page}, {c_size(k.shape[2])}, "
    shape += f"{c_size(v.shape[2])}}};"
    rows = f"k, {c_size(k.strides[0])}, v, {c_size(v.strides[0])}, kc, vc, slots, {c_size(k.shape[0])}"
    body = f"  const {shape}\n  llmc::kv_write<{k_cache.ctype}>(tid, nt, {rows}, shape);"
    parameters = [("const float*", "k"), ("const float*", "v"), ("char*", "kc"), ("char*", "vc")]
    function = emitter.unit.function("kv_write", [*parameters, ("const int64_t*", "slots")], body)
    arguments = [pointer(k), pointer(v), pointer(k_cache, "char"), pointer(v_cache, "char"), pointer(slots)]
    emitter.unit.call(emitter.comment(node), function, arguments, [k, v, slots], [k_cache, v_cache])
    return Value("nullptr", "float", (sympy.Integer(0),), (sympy.Integer(1),))


def _page_tokens(cache: Value) -> int:
    page = int(cache.shape[1])
    if page % _CHUNK_TOKENS:
        raise TargetError(
            "cpu.page_tokens",
            f"The KV cache has pages of {page} tokens.",
            f"CPU kernels keep tokens in chunks of {_CHUNK_TOKENS}.",
            "Set kv_layout.page_tokens to a multiple of 16, for example 32.",
        )
    return page


def _kv_write(emitter: Emitter, node: fx.Node) -> Value:
    k, v, slots = (emitter.value(node.args[index]) for index in (0, 1, 4))
    return _write(emitter, node, k, v, node.args[2:4], slots)


def _rope_kv_write(emitter: Emitter, node: fx.Node) -> tuple[Value, Value]:
    args: list[Any] = list(node.args)
    rotated_q = _rotate(emitter, node, args[0], emitter.output(node, 0), args[3:8])
    k = emitter.value(args[1])
    rotated_k = _rotate(emitter, node, args[1], emitter.buffer(f"{node.name}_k", "float", k.shape), args[3:8])
    slots = emitter.value(args[10])
    return rotated_q, _write(emitter, node, rotated_k, emitter.value(args[2]), args[8:10], slots)


def _shape_text(sizes: Sequence[Size], rest: Sequence[Any], sinks: str) -> str:
    scale, window, softcap, chunk = rest
    texts = [*(c_size(size) for size in sizes), literal(float(scale)), literal(float(softcap))]
    return f"llmc::AttentionShape{{{', '.join([*texts, str(window), str(chunk), sinks])}}}"


def _paged_attention(emitter: Emitter, node: fx.Node) -> Value:
    args: list[Any] = list(node.args)
    q = _heads_dense(emitter, emitter.value(args[0]), node)
    k_cache, v_cache, table, starts, positions = (emitter.value(args[i]) for i in (1, 2, 4, 5, 6))
    sinks = None if args[7] is None else emitter.value(args[7])
    out = emitter.output(node)
    page = sympy.Integer(_page_tokens(k_cache))
    sizes = [q.shape[1], k_cache.shape[2], q.shape[2], v_cache.shape[3], page]
    shape = _shape_text(sizes, args[8:12], "sinks")
    emitter.unit.scratch.add(_shape_text(sizes, args[8:12], "nullptr"))
    row = c_size(out.shape[1] * out.shape[2])
    batch = f"{{q, {c_size(q.strides[0])}, kc, vc, table, starts, positions, "
    batch += f"{c_size(table.shape[1])}, s.S, o, {row}}}"
    parameters = [("float*", "o"), ("const float*", "q"), ("const char*", "kc"), ("const char*", "vc")]
    parameters += [("const int64_t*", name) for name in ("table", "starts", "positions")]
    parameters.append(("const float*", "sinks"))
    caches = [pointer(k_cache, "char"), pointer(v_cache, "char")]
    arguments = [pointer(out), pointer(q), *caches, *(pointer(v) for v in (table, starts, positions))]
    arguments.append("nullptr" if sinks is None else pointer(sinks))
    reads = [value for value in (q, k_cache, v_cache, sinks) if value is not None]
    for half, kernel in (("", f"llmc::attention<{k_cache.ctype}>"), (" (merge)", "llmc::attention_merge")):
        body = "\n".join(
            [
                f"  const auto shape = {shape};",
                f"  const llmc::AttentionBatch batch{batch};",
                f"  {kernel}(tid, nt, shape, batch, s.scratch);",
            ]
        )
        function = emitter.unit.function("attention", parameters, body)
        emitter.unit.call(emitter.comment(node) + half, function, arguments, reads, [out])
    return out


LOWERINGS: dict[str, Lowering] = {
    "llmc.rope": _rope,
    "llmc.kv_write": _kv_write,
    "llmc.rope_kv_write": _rope_kv_write,
    "llmc.paged_attention": _paged_attention,
}
