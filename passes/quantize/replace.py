"""Replace one weight by its codes in everything that reads it.

Knows which operators have a quantised form and what a weight is for; chooses no scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import fx

from ...ir.program import Program
from ...ir.weights import Expr, Quantized
from ...spec.quant import QuantScheme
from ..fuse_linears import LINEAR, nearest_linears
from ..graph import argument, calls, is_call, read_weight, weight_nodes
from ..rewrite import insert

EMBEDDING = torch.ops.llmc.embedding.default
MOE = torch.ops.llmc.moe.default
QUANTIZED_LINEAR = torch.ops.llmc.quantized_linear.default
QUANTIZED_EMBEDDING = torch.ops.llmc.quantized_embedding.default
QUANTIZED_MOE = torch.ops.llmc.quantized_moe.default


# The stored parts of a weight in a scheme, by the names they get.
PartsOf = Callable[[str, Expr, QuantScheme], dict[str, Expr]]


class Role(Enum):
    """What a weight is for; the value says it in words."""

    linear = "linear"
    head = "output head"
    embedding = "embedding"
    tied = "output head and embedding"
    router = "router"
    expert = "experts"


def weight_roles(graph: fx.Graph, program: Program) -> dict[str, Role]:
    """The role of each weight that has one: all its readers have a quantised form."""
    output = next(node for node in graph.nodes if node.op == "output")
    vocab = program.spec.vocab_size
    heads = {node for node in nearest_linears(output) if node.meta["val"].shape[-1] == vocab}
    routers = {linear for moe in calls(graph, MOE) for linear in _routers(moe)}
    found: dict[str, Role] = {}
    for name, node in weight_nodes(graph).items():
        linears = [user for user in node.users if is_call(user, LINEAR) and argument(user, "weight") is node]
        tables = [user for user in node.users if is_call(user, EMBEDDING)]
        mixtures = [user for user in node.users if is_call(user, MOE) and node in _experts(user)]
        if len(linears) + len(tables) + len(mixtures) != len(node.users):
            continue
        if mixtures:
            if len(node.users) == 1:
                found[name] = Role.expert
        elif tables:
            found[name] = Role.tied if linears else Role.embedding
        elif any(linear in routers for linear in linears):
            found[name] = Role.router
        else:
            found[name] = Role.head if any(linear in heads for linear in linears) else Role.linear
    return found


def _routers(moe: fx.Node) -> list[fx.Node]:
    num_experts = argument(moe, "gate_up").meta["val"].shape[0]
    sources = [argument(moe, "expert_ids"), argument(moe, "expert_weights")]
    linears = [linear for source in sources for linear in nearest_linears(source)]
    return [linear for linear in linears if linear.meta["val"].shape[-1] == num_experts]


def _experts(moe: fx.Node) -> list[fx.Node]:
    return [argument(moe, "gate_up"), argument(moe, "down")]


def parts_of(name: str, expr: Expr, scheme: QuantScheme) -> dict[str, Expr]:
    """The stored parts of a weight rounded to nearest, by the names they get: codes, scales, zeros."""
    parts = ("codes", "scales") if scheme.symmetric else ("codes", "scales", "zeros")
    return {f"{name}.{part}": Quantized(expr, scheme, part) for part in parts}


def quantize_matrix(
    graph: fx.Graph, reader: fx.Node, scheme: QuantScheme, expr: Expr, parts: PartsOf = parts_of
) -> dict[str, Expr]:
    """Give every linear and table that reads weight `reader` its codes; returns the weights that are new."""
    added = parts(str(reader.target), expr, scheme)
    with graph.inserting_before(reader):
        codes, scales, zeros = _read(graph, added)
    dtype = str(expr.dtype).removeprefix("torch.")
    for user in list(reader.users):
        with graph.inserting_before(user):
            if is_call(user, LINEAR):
                args = (argument(user, "x"), codes, scales, zeros, argument(user, "bias"), scheme.name)
                new = insert(graph, QUANTIZED_LINEAR, args, like=user.meta["val"])
            else:
                ids, width = argument(user, "ids"), expr.shape[-1]
                args = (ids, codes, scales, zeros, scheme.name, width, dtype)
                new = insert(graph, QUANTIZED_EMBEDDING, args, like=user.meta["val"])
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    return added


def quantize_experts(
    graph: fx.Graph,
    moe: fx.Node,
    program: Program,
    schemes: tuple[QuantScheme, QuantScheme],
    parts: PartsOf = parts_of,
) -> dict[str, Expr]:
    """Give one `llmc.moe` the codes of its experts, `gate_up` first; returns the weights that are new."""
    added: dict[str, Expr] = {}
    read: list[fx.Node | None] = []
    with graph.inserting_before(moe):
        for node, scheme in zip(_experts(moe), schemes, strict=True):
            name = str(node.target)
            own = parts(name, program.weights[name], scheme)
            read.extend(_read(graph, own))
            added |= own
        inputs = [argument(moe, name) for name in ("x", "expert_ids", "expert_weights")]
        biases = [argument(moe, name) for name in ("gate_up_bias", "down_bias")]
        settings = [argument(moe, name) for name in ("activation", "interleaved", "alpha", "limit")]
        args = (*inputs, *read, *biases, *settings, *(scheme.name for scheme in schemes))
        new = insert(graph, QUANTIZED_MOE, args, like=moe.meta["val"])
    moe.replace_all_uses_with(new)
    graph.erase_node(moe)
    return added


def _read(graph: fx.Graph, parts: dict[str, Expr]) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    nodes = [read_weight(graph, name) for name in parts]
    return nodes[0], nodes[1], nodes[2] if len(nodes) > 2 else None
