"""Rotate q and k and write the cache in one operator.

    q = llmc.rope(q0, positions, f, 1.0, 'half', False)
    k = llmc.rope(k0, positions, f, 1.0, 'half', False)
    t = llmc.kv_write(k, v, k_cache, v_cache, slots)            (paged_attention reads q and t)
                                    ↓
    r = llmc.rope_kv_write(q0, k0, v, positions, f, 1.0, 'half', False, k_cache, v_cache, slots)
    q = r[0]; t = r[1]

Only where q and k turn by the same angles, and the rotated k goes nowhere but the cache.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..ir.program import Program
from .base import PAGED, Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .graph import argument, calls, erase_dead, is_call
from .paged_attention import KV_WRITE, PAGED_ATTENTION
from .rewrite import insert

ROPE = torch.ops.llmc.rope.default
FUSED = torch.ops.llmc.rope_kv_write.default
_ANGLES = ("positions", "inv_freq", "scale", "style", "tail")


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseRopeCache:
    """Join the rotations of an attention with its cache write."""

    name: ClassVar[str] = "fuse_rope_cache"
    stage: ClassVar[Stage] = Stage.layout
    requires: ClassVar[frozenset[str]] = frozenset({PAGED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per cache write; misses say why one stands alone."""
        graph = program.copy_graph()
        misses: list[str] = []
        matches = 0
        for write in calls(graph, KV_WRITE):
            found = _query_rope(write)
            if isinstance(found, str):
                misses.append(f"{write.name}: {found}")
                continue
            _fuse(graph, write, found)
            matches += 1
        erase_dead(graph)
        report = PassReport(matches=matches, misses=tuple(misses))
        return PassResult(program=program.replace(graph=graph), report=report)


def _query_rope(write: fx.Node) -> fx.Node | str:
    """The rope of the q that is attended right after `write`, or why it cannot be joined."""
    k_rope = argument(write, "k")
    if not is_call(k_rope, ROPE):
        return "its k is not rotated last"
    if len(k_rope.users) > 1:
        return "its rotated k is used elsewhere too"
    readers = [user for user in write.users if is_call(user, PAGED_ATTENTION)]
    q_rope: Any = argument(min(readers), "q") if readers else None
    if not isinstance(q_rope, fx.Node) or not is_call(q_rope, ROPE):
        return "its q is not rotated last"
    if _angles(q_rope) != _angles(k_rope):
        return "its q and k turn by different angles"
    if any(user < _latest(write, q_rope) for user in q_rope.users):
        return "its q is needed before its k and v are computed"
    return q_rope


def _angles(rope: fx.Node) -> list[Any]:
    return [argument(rope, name) for name in _ANGLES]


def _latest(write: fx.Node, q_rope: fx.Node) -> fx.Node:
    return max(argument(write, "k"), argument(write, "v"), q_rope)


def _fuse(graph: fx.Graph, write: fx.Node, q_rope: fx.Node) -> None:
    k_rope = argument(write, "k")
    caches = [argument(write, name) for name in ("k_cache", "v_cache", "slots")]
    scales = [argument(write, name) for name in ("k_scales", "v_scales")]
    caches += [] if scales[0] is None else scales
    args = (argument(q_rope, "x"), argument(k_rope, "x"), argument(write, "v"), *_angles(q_rope), *caches)
    last = _latest(write, q_rope)
    with graph.inserting_after(last):
        fused = insert(graph, FUSED, args)
    with graph.inserting_after(fused):
        rotated = graph.call_function(operator.getitem, (fused, 0))
    with graph.inserting_after(rotated):
        written = graph.call_function(operator.getitem, (fused, 1))
    rotated.meta["val"], written.meta["val"] = q_rope.meta["val"], write.meta["val"]
    q_rope.replace_all_uses_with(rotated)
    write.replace_all_uses_with(written)
    graph.erase_node(write)
