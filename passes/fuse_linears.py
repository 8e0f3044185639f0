"""Join linears that share an input into one: their weights stacked lazily, their results slices.

Knows how to join; which linears belong together is the business of the passes that call it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import fx

from ..ir.coded import coded_form, is_coded
from ..ir.program import Program
from ..ir.weights import Concat, Constant, Expr
from .graph import argument, is_call, is_weight, read_weight
from .rewrite import insert

LINEAR = torch.ops.llmc.linear.default
ATTENTION = torch.ops.llmc.attention.default


def obstacle(nodes: Sequence[fx.Node], program: Program) -> str | None:
    """Why these `llmc.linear` nodes of one input cannot be joined; None when they can."""
    for node in nodes:
        weight = argument(node, "weight")
        if not is_weight(weight):
            return f"{node.name}: its weight is computed in the graph"
        if len(weight.users) > 1:
            return f"{node.name}: its weight {weight.target!r} is read elsewhere too"
        bias = argument(node, "bias")
        if bias is not None and (not is_weight(bias) or len(bias.users) > 1):
            return f"{node.name}: its bias is computed in the graph or read elsewhere too"
    dtypes = {program.weights[str(argument(node, "weight").target)].dtype for node in nodes}
    if len(dtypes) > 1:
        return f"{nodes[0].name}: weights of several dtypes share its input"
    exprs = [program.weights[str(argument(node, "weight").target)] for node in nodes]
    if any(map(is_coded, exprs)) and coded_form(Concat(tuple(exprs), 0)) is None:
        return f"{nodes[0].name}: weights that share its input are stored as codes of different kinds"
    return None


def nearest_linears(start: fx.Node) -> Iterator[fx.Node]:
    """The `llmc.linear` nodes above `start` with no other one and no attention between, in argument order."""
    pending, seen = [start], {start}
    while pending:
        node = pending.pop()
        if is_call(node, LINEAR):
            yield node
        elif not is_call(node, ATTENTION):
            fresh = [source for source in reversed(node.all_input_nodes) if source not in seen]
            seen.update(fresh)
            pending.extend(fresh)


def join_linears(
    graph: fx.Graph, program: Program, nodes: Sequence[fx.Node]
) -> tuple[fx.Node, dict[str, Expr]]:
    """Put one linear before the first of `nodes`; gives it and the weights it reads.

    Its rows are those of `nodes` in the order given. The caller replaces the uses of `nodes`. A bias
    that only some have is zero for the others.
    """
    names = [str(argument(node, "weight").target) for node in nodes]
    weights = tuple(program.weights[name] for name in names)
    added: dict[str, Expr] = {joined_name(names): Concat(weights, 0)}
    biases = [argument(node, "bias") for node in nodes]
    if any(bias is not None for bias in biases):
        parts = tuple(
            Constant(torch.zeros(weight.shape[0], dtype=weight.dtype))
            if bias is None
            else program.weights[str(bias.target)]
            for bias, weight in zip(biases, weights, strict=True)
        )
        added[joined_name(names).removesuffix(".weight") + ".bias"] = Concat(parts, 0)
    first = min(nodes)
    with graph.inserting_before(first):
        read = [read_weight(graph, name) for name in added]
        bias_node = read[1] if len(read) > 1 else None
        joined = insert(graph, LINEAR, (argument(first, "x"), read[0], bias_node))
    return joined, added


def slice_last(graph: fx.Graph, node: fx.Node, rank: int, start: int, stop: int) -> fx.Node:
    """Columns `start` to `stop` of the last dimension of `node`, at the insertion point."""
    return insert(graph, torch.ops.aten.slice.Tensor, (node, rank - 1, start, stop))


def joined_name(names: Sequence[str]) -> str:
    """`a.q+k+v.weight` for `a.q.weight`, `a.k.weight`, `a.v.weight`: readable, and unique as they are."""
    stems = [name.removesuffix(".weight").split(".") for name in names]
    levels = zip(*(stem[:-1] for stem in stems), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    parts = [".".join(stem[len(shared) :]) for stem in stems]
    return ".".join([*shared, "+".join(parts)]) + ".weight"
