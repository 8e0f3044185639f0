"""Mixtures of experts: tokens sorted by expert, then products over all chosen experts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from ..emitter import Emitter, Lowering
from ..matrix import Matrix, StoredMatrix
from ..unit import pointer
from ..value import Size, Value, c_size, product
from .canonical import ACTIVATION_KINDS, activation_kind, dense, optional_dense, quantized_matrix, stored
from .elementwise import literal
from .products import Slots, matrix_product


def _grouped(emitter: Emitter, node: fx.Node, ids: Value, experts: int) -> Value:
    """Slots sorted by expert (`llmc::ExpertGroups`), once for all that share their ids."""
    tokens, choices = product(ids.shape[:-1]), ids.shape[-1]
    key = (ids, f"experts {experts}")
    if key not in emitter.shared:
        size = sympy.expand(experts + 1 + 2 * tokens * choices)
        out = emitter.buffer(f"{node.name}_slots", "float", (size,))
        groups = f"llmc::expert_groups(o, {experts}, {c_size(tokens)}, {c_size(choices)})"
        body = f"  llmc::group_experts(tid, ids, {c_size(tokens)}, {c_size(choices)}, {groups});"
        function = emitter.unit.function("group", [("float*", "o"), ("const int64_t*", "ids")], body)
        comment = f"slots of {node.name}, sorted by expert"
        emitter.unit.call(comment, function, [pointer(out), pointer(ids)], [ids], [out])
        emitter.shared[key] = out
    return emitter.shared[key]


def _activated(emitter: Emitter, node: fx.Node, hidden: Value, width: Size, settings: Sequence[Any]) -> Value:
    """The experts' activation over all slots; `settings` = activation, interleaved, alpha, limit."""
    name, interleaved = str(settings[0]), bool(settings[1])
    slots, columns = c_size(hidden.shape[0]), c_size(hidden.shape[1])
    out = emitter.buffer(f"{node.name}_gated", "float", (hidden.shape[0], width))
    n = c_size(width)
    if name.startswith("plain:"):
        kind = activation_kind(name.removeprefix("plain:"))
        call = f"llmc::activate_rows<{kind}>(tid, nt, h, {columns}, o, {n}, {slots}, {n})"
    else:
        combine = f"llmc::Gated<{activation_kind(name)}>{{}}" if name in ACTIVATION_KINDS else ""
        if name == "clamped_swiglu":
            combine = f"llmc::ClampedSwiglu{{{literal(float(settings[2]))}, {literal(float(settings[3]))}}}"
        elif not combine:
            activation_kind(name)
        if interleaved:
            call = f"llmc::gated_pairs(tid, nt, {combine}, h, {columns}, o, {n}, {slots}, {n})"
        else:
            halves = f"h, {columns}, h + {n}, {columns}"
            call = f"llmc::gated_rows(tid, nt, {combine}, {halves}, o, {n}, {slots}, {n})"
    function = emitter.unit.function("experts_gate", [("float*", "o"), ("const float*", "h")], f"  {call};")
    emitter.unit.call(emitter.comment(node), function, [pointer(out), pointer(hidden)], [hidden], [out])
    return out


def _mixture(
    emitter: Emitter,
    node: fx.Node,
    matrices: tuple[Matrix, Matrix],
    sizes: tuple[int, int, int],
    rest: Sequence[Any],
    activation: str = "",
) -> Value:
    """`rest` = gate_up_bias, down_bias, activation, interleaved, alpha, limit; `sizes` = experts, hidden
    columns, gated columns."""
    x, ids, weights = (dense(emitter, arg, node) for arg in node.args[:3])
    biases = [optional_dense(emitter, arg, node) for arg in rest[:2]]
    experts, columns, width = sizes
    tokens, choices = product(ids.shape[:-1]), ids.shape[-1]
    slots = sympy.expand(tokens * choices)
    groups = _grouped(emitter, node, ids, experts)
    rows = Slots(groups, experts, tokens, choices, by_token=True)
    hidden = emitter.buffer(f"{node.name}_hidden", "float", (slots, sympy.Integer(columns)))
    matrix_product(emitter, node, matrices[0], hidden, x, biases[0], activation, rows)
    gated = _activated(emitter, node, hidden, sympy.Integer(width), rest[2:])
    rows = Slots(groups, experts, tokens, choices, by_token=False)
    results = emitter.buffer(f"{node.name}_results", "float", (slots, x.shape[-1]))
    matrix_product(emitter, node, matrices[1], results, gated, biases[1], activation, rows)
    out = emitter.output(node)
    d, counts = c_size(x.shape[-1]), f"{c_size(tokens)}, {c_size(choices)}"
    body = f"  llmc::combine_experts(tid, nt, {rows.text}, w, {counts}, y, {d}, o, {d}, {d});"
    parameters = [("float*", "o"), ("const float*", "y"), ("const float*", "w"), ("const float*", "g")]
    function = emitter.unit.function("combine", parameters, body)
    arguments = [pointer(value) for value in (out, results, weights, groups)]
    emitter.unit.call(emitter.comment(node), function, arguments, [results, weights, groups], [out])
    return out


def _moe(emitter: Emitter, node: fx.Node) -> Value:
    args: list[Any] = list(node.args)
    gate_up, down = (StoredMatrix(*stored(arg)) for arg in args[3:5])
    sizes = (gate_up.shape[0], gate_up.shape[1], down.shape[2])
    return _mixture(emitter, node, (gate_up, down), sizes, args[5:11])


def _quantized_moe(emitter: Emitter, node: fx.Node) -> Value:
    args: list[Any] = list(node.args)
    width = int(args[0].meta["val"].shape[-1])
    experts, hidden = (int(size) for size in args[3].meta["val"].shape[:2])
    inner = hidden if str(args[11]).startswith("plain:") else hidden // 2
    gate_up = quantized_matrix(args[3:6], str(args[15]), width)
    down = quantized_matrix(args[6:9], str(args[16]), inner)
    activation = str(args[17]) if len(args) > 17 else ""
    return _mixture(emitter, node, (gate_up, down), (experts, hidden, inner), args[9:15], activation)


LOWERINGS: dict[str, Lowering] = {"llmc.moe": _moe, "llmc.quantized_moe": _quantized_moe}
