"""Which operators become part of others: of a matrix product the norm before, the gated activation and the
residual addition behind; of rotation and cache write the norms of queries and keys.

    rms_norm → linear → gated_activation_packed → linear → add_rms_norm    →    product → product → product
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# What may be fused, by name: operators need not be registered when this module is imported.
_PRODUCTS = ("llmc.linear.default", "llmc.quantized_linear.default")
_ROTATION = "llmc.rope_kv_write.default"
_NORM, _GATE, _SUM = "llmc.rms_norm.default", "llmc.gated_activation_packed.default", "aten.add.Tensor"
# A sum and its norm in one -> the norm alone.
_SUMS = {
    "llmc.add_rms_norm.default": "rms_norm",
    "llmc.add_layer_norm.default": "layer_norm",
}


@dataclass(slots=True)
class _Product:
    """A product, what it takes, and the node whose value it gives."""

    node: fx.Node
    x: fx.Node
    gives: fx.Node
    norm: tuple[Any, ...] | None = None
    gate: str = ""
    residual: fx.Node | None = None


def fuse_products(graph: fx.Graph, multiply: Callable[..., Any]) -> None:
    """Replace products and what can be part of them by calls of `multiply(x, weight, norm, gate, residual)`:
    `weight` are the arguments of `llmc.linear` or `llmc.quantized_linear` behind x, `norm` those of
    `llmc.rms_norm` behind its own, or None.

    What else needs a value in between keeps it from being fused.
    """
    for node in list(graph.nodes):
        if str(node.target) in _SUMS:
            _separate(graph, node)
    found = [_found(node) for node in graph.nodes if str(node.target) in _PRODUCTS]
    for each in found:
        weight = each.node.args[1:]
        with graph.inserting_before(each.gives):
            made = graph.call_function(multiply, (each.x, weight, each.norm, each.gate, each.residual))
        each.gives.replace_all_uses_with(made)
        made.name = each.gives.name  # whose value it is
        for other in found:
            other.x = made if other.x is each.gives else other.x
            other.residual = made if other.residual is each.gives else other.residual
    _erase_unused(graph)


def fuse_rotations(graph: fx.Graph, rotate: Callable[..., Any]) -> None:
    """Replace `llmc.rope_kv_write(q, k, v, *rest)` of RMS norms of q and k that nobody else needs by
    `rotate(q, k, v, norms, *rest)`: `norms` are the weights of both, and eps, offset and style."""
    for node in list(graph.nodes):
        if str(node.target) != _ROTATION:
            continue
        q, k, v, *rest = node.args
        q_norm, k_norm = _norm_of(q, node), _norm_of(k, node)
        if q_norm is None or k_norm is None or q_norm[1:] != k_norm[1:]:
            continue
        node.target = rotate
        node.args = (q.args[0], k.args[0], v, (q_norm[0], *k_norm), *rest)
        graph.erase_node(q)
        graph.erase_node(k)


def _norm_of(value: Any, user: fx.Node) -> tuple[Any, ...] | None:
    """Weight, eps, offset and style of the RMS norm that `value` is, where `user` alone needs it."""
    if _only_user(value) is not user or str(value.target) != _NORM or value.args[1] is None:
        return None
    return tuple(value.args[1:])


def _separate(graph: fx.Graph, node: fx.Node) -> None:
    """A sum and its norm as two operators, where the sum can be part of a product."""
    x, residual, *rest = node.args
    if not any(_only_user(each) is node and _is_product(each) for each in (x, residual)):
        return
    with graph.inserting_before(node):
        total = graph.call_function(torch.ops.aten.add.Tensor, (x, residual))
        norm = getattr(torch.ops.llmc, _SUMS[str(node.target)]).default
        normed = graph.call_function(norm, (total, *rest))
    for user in list(node.users):
        part = normed if user.args[1] == 0 else total
        user.replace_all_uses_with(part)
        graph.erase_node(user)
        part.name = user.name
    graph.erase_node(node)


def _found(node: fx.Node) -> _Product:
    """`node` with everything around it that is nobody else's."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    product = _Product(node, x, node)
    norm = _norm_of(x, node)
    if norm is not None:
        product.x, product.norm = x.args[0], norm  # pyright: ignore[reportAttributeAccessIssue]
    user = _only_user(node)
    if user is None:
        return product
    if str(user.target) == _GATE:
        product.gate, product.gives = str(user.args[1]), user
    elif str(user.target) == _SUM and not user.kwargs:
        others = [each for each in user.args if each is not node]
        # Of two products, the later one adds the other.
        if len(others) == 1 and isinstance(others[0], fx.Node) and _adds(node, others[0]):
            product.residual, product.gives = others[0], user
    return product


def _adds(node: fx.Node, other: fx.Node) -> bool:
    return not (_is_product(other) and len(other.users) == 1 and node < other)


def _is_product(value: object) -> bool:
    return isinstance(value, fx.Node) and str(value.target) in _PRODUCTS


def _only_user(value: object) -> fx.Node | None:
    users = list(value.users) if isinstance(value, fx.Node) else []
    return users[0] if len(users) == 1 else None


def _erase_unused(graph: fx.Graph) -> None:
    """What became part of products; operators that write caches stay, whoever looks at their results."""
    names = {*_PRODUCTS, *(f"llmc.{norm}.default" for norm in _SUMS.values()), _GATE, _SUM}
    for node in reversed(list(graph.nodes)):
        is_part = node.target is operator.getitem or str(node.target) in names
        if node.op == "call_function" and not node.users and is_part:
            graph.erase_node(node)
