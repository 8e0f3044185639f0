"""Write K and V to the paged cache and read them back from there.

    o = llmc.attention(q, k, v, positions, None, 0, 0, 0.125, 0, 0.0, 0)
                                    ↓
    t = llmc.kv_write(k, v, k_cache_0, v_cache_0, slots_0)
    o = llmc.paged_attention(q, k_cache_0, v_cache_0, t, block_table_0, query_starts, positions, ...)

A cache of codes has scales beside it, `k_scales_0` and `v_scales_0`, which come last in both operators. A
layer that shares another's cache reads it after the owner has written; its own K and V are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..ir.paged import (
    QUERY_STARTS,
    block_table_name,
    cache_names,
    k_cache_name,
    paged_inputs,
    slots_name,
    v_cache_name,
)
from ..ir.program import Program
from ..spec.cache import CacheLayout
from ..spec.errors import InternalError
from .base import (
    KV_LAYOUT,
    PAGED,
    Contract,
    Lossy,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    Within,
    expect_option,
)
from .graph import argument, calls, erase_dead
from .rewrite import insert

ATTENTION = torch.ops.llmc.attention.default
KV_WRITE = torch.ops.llmc.kv_write.default
PAGED_ATTENTION = torch.ops.llmc.paged_attention.default


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """Attention over the cache that `kv_layout` planned."""

    name: ClassVar[str] = "paged_attention"
    stage: ClassVar[Stage] = Stage.layout
    requires: ClassVar[frozenset[str]] = frozenset({KV_LAYOUT})
    provides: ClassVar[frozenset[str]] = frozenset({PAGED})
    # Steps cut the rows of products elsewhere, and deep models multiply a rounding.
    contract: ClassVar[Contract] = Within(1e-5)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per attention. Lossy when the cache is narrower than what is computed."""
        assert program.cache is not None
        graph = program.copy_graph()
        inputs = _add_inputs(graph, program.cache)
        written: dict[int, fx.Node] = {}
        attentions = calls(graph, ATTENTION)
        for node in attentions:
            _rewrite(graph, node, program.cache, inputs, written)
        erase_dead(graph)
        narrower = any(
            group.is_coded or _bits(group.dtype) < _bits(program.spec.compute_dtype)
            for group in program.cache.groups
        )
        report = PassReport(matches=len(attentions), contract=Lossy() if narrower else None)
        done = program.replace(graph=graph, inputs=paged_inputs(program.cache))
        return PassResult(program=done, report=report)


def _bits(dtype: str) -> int:
    return torch.finfo(getattr(torch, dtype)).bits


def _add_inputs(graph: fx.Graph, layout: CacheLayout) -> dict[str, fx.Node]:
    """Placeholders for the inputs of `layout` that the graph does not have, after those it has."""
    nodes = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    last = list(nodes.values())[-1]
    for entry in paged_inputs(layout):
        if entry.name not in nodes:
            with graph.inserting_after(last):
                last = nodes[entry.name] = graph.placeholder(entry.name)
    return nodes


def _rewrite(
    graph: fx.Graph,
    node: fx.Node,
    layout: CacheLayout,
    inputs: dict[str, fx.Node],
    written: dict[int, fx.Node],
) -> None:
    layer = argument(node, "layer")
    group, owner = layout.owner_of(layer)
    caches = inputs[k_cache_name(owner)], inputs[v_cache_name(owner)]
    scales = tuple(inputs[name] for name in cache_names(layout.groups[group], owner)[2:])
    with graph.inserting_before(node):
        if owner == layer:
            fresh = argument(node, "k"), argument(node, "v")
            written[layer] = insert(graph, KV_WRITE, (*fresh, *caches, inputs[slots_name(group)], *scales))
        elif owner not in written:
            raise InternalError(
                "passes.kv_order",
                f"Attention layer {layer} reads the cache of layer {owner}.",
                "That layer runs later in the step.",
                "This is a defect of the trace; report it with the model's config.json.",
            )
        where = inputs[block_table_name(group)], inputs[QUERY_STARTS], argument(node, "positions")
        settings = [argument(node, name) for name in ("sinks", "scale", "window", "softcap", "chunk")]
        args = (argument(node, "q"), *caches, written[owner], *where, *settings, *scales)
        paged = insert(graph, PAGED_ATTENTION, args, like=node.meta["val"])
    node.replace_all_uses_with(paged)
    graph.erase_node(node)
