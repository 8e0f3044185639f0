"""Compute behind the last attention for the rows alone whose logits are wanted: of a prompt, the last token.

    o = llmc.linear(a, w)                                 g = llmc.gather_rows(a, out_rows)
    s = aten.add(x, o)                                    h = llmc.gather_rows(x, out_rows)
    …                                                     o = llmc.linear(g, w)
    y = llmc.linear(n, d); t = aten.add(s, y)      →      s = aten.add(h, o)
    z = llmc.gather_rows(t, out_rows)                     …
                                                          y = llmc.linear(n, d); z = aten.add(s, y)

As far up as operators compute each row from the same row of their operands. A token whose logits nobody
wants ends with its keys and values. The last sum joins its norm, which the choice of rows kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ..ir.infer import infer
from ..ir.program import Program
from ..ir.wanted_rows import wanted_alone
from ..spec.history import Decision
from .base import CANONICAL, Contract, Exact, PassContext, PassReport, PassResult, Stage, expect_option
from .fuse_add_norm import fuse_sums
from .graph import argument, argument_names, calls, is_weight
from .rewrite import (
    LAST_DIM,
    at,
    insert,
    is_elementwise,
    llmc,
    operator_of,
    rank_of,
    same_dim,
    shape_of,
)

# Of these every operand that is no weight has a row a token.
_BY_ROWS = LAST_DIM | {"llmc.add_rms_norm", "llmc.add_layer_norm", "llmc.moe", "llmc.quantized_moe"}
# These work along dimensions that an argument names.
_ALONG = frozenset(
    """
    _softmax amax amin any argmax argmin argsort cat chunk cumsum gather logsumexp max mean min narrow scatter
    scatter_add select slice softmax sort split split_with_sizes squeeze std sum topk unbind unsqueeze var
    """.split()  # noqa: SIM905
)
_PRODUCTS = frozenset({"llmc.linear", "llmc.quantized_linear", "llmc.moe", "llmc.quantized_moe"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowRows:
    """Compute what only logits depend on for the wanted rows alone."""

    name: ClassVar[str] = "narrow_rows"
    stage: ClassVar[Stage] = Stage.layout
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per operator that takes fewer rows."""
        if not context.target.narrows_rows:
            return PassResult(program=program, report=PassReport(misses=(f"target {context.target.name}",)))
        graph = program.copy_graph()
        narrow = wanted_alone(graph, works_on_rows)
        products = [node for node in narrow if operator_of(node) in _PRODUCTS]
        if not products:
            return PassResult(program=program, report=PassReport(misses=(_obstacle(graph),)))
        _narrow(graph, narrow)
        matches = sum(operator_of(node) != "getitem" for node in narrow)
        whole = dict.fromkeys(source.name for sources in narrow.values() for source in sources)
        decision = Decision(
            subject=f"{next(iter(narrow)).name} and what follows",
            choice=f"{matches} operators, {len(products)} of them products, for the wanted rows alone",
            reason=f"only logits depend on them; of all rows they read {', '.join(whole)}",
        )
        done = program.replace(graph=graph)
        infer(done)
        fuse_sums(graph)  # the choice of rows may have stood between the last sum and its norm
        return PassResult(program=done, report=PassReport(matches=matches, decisions=(decision,)))


def _obstacle(graph: fx.Graph) -> str:
    """Why no product takes fewer rows."""
    rows = next(node for node in graph.nodes if node.target == "out_rows")
    others = [operator_of(user) for user in rows.users if operator_of(user) != "llmc.gather_rows"]
    if others:
        return f"rows are chosen by {', '.join(others)}, not by llmc.gather_rows"
    return "no product stands between the last attention and the choice of rows"


def _narrow(graph: fx.Graph, narrow: Mapping[fx.Node, tuple[fx.Node, ...]]) -> None:
    """Let the nodes of `narrow` read wanted rows, in place."""
    rows = next(node for node in graph.nodes if node.target == "out_rows")
    for gather in calls(graph, llmc.gather_rows.default):
        source = argument(gather, "x")
        if source in narrow and argument(gather, "rows") is rows:
            gather.replace_all_uses_with(source)
            graph.erase_node(gather)
    gathered: dict[fx.Node, fx.Node] = {}
    for node, whole in narrow.items():
        for source in whole:
            if source not in gathered:
                with graph.inserting_after(source):
                    gathered[source] = insert(graph, llmc.gather_rows.default, (source, rows))
            node.replace_input_with(source, gathered[source])
        del node.meta["val"]


def works_on_rows(node: fx.Node) -> bool:
    """Whether an operator call computes row i of its result from row i of the operands that have as many."""
    name, rank = operator_of(node), _rank(node)
    sources = [source for source in node.all_input_nodes if not is_weight(source)]
    if is_elementwise(node):
        # Broadcasting aligns from the right: rows meet rows where ranks are equal.
        weights = [source for source in node.all_input_nodes if is_weight(source)]
        same = all(_rank(each) == rank for each in sources)
        return rank is not None and same and all(rank_of(each) < rank for each in weights)
    if name in _BY_ROWS:
        return all((_rank(each) or 0) > 1 for each in sources)
    if name in _ALONG:
        return _names_no_rows(node)
    rule = _RULES.get(name)
    return rule is not None and rule(node)


def _rank(node: fx.Node) -> int | None:
    """How many dimensions a tensor has; None for anything else."""
    return rank_of(node) if hasattr(node.meta["val"], "shape") else None


def _names_no_rows(node: fx.Node) -> bool:
    """The dimensions that a call names, if it does, do not have the rows among them."""
    asked: Any = argument(node, "dim") if "dim" in argument_names(node) else None
    dims = [asked] if isinstance(asked, int) else list(asked or ())
    sources = node.all_input_nodes
    rank = _rank(sources[0])
    if not dims or not rank or any(_rank(each) != rank for each in sources):
        return False
    if not all(same_dim(shape_of(each)[0], shape_of(sources[0])[0]) for each in sources):
        return False
    # An insertion counts in the result's dimensions, all others in the operands'.
    return all(at(dim, rank + (operator_of(node) == "unsqueeze")) != 0 for dim in dims)


def _keeps_rows(node: fx.Node) -> bool:
    """A reshape of what lies behind the rows: the first size is left open, and nothing else is computed."""
    sizes = argument(node, "size" if operator_of(node) == "view" else "shape")
    return len(node.all_input_nodes) == 1 and len(sizes) > 1 and sizes[0] == -1


def _permutes_behind(node: fx.Node) -> bool:
    return at(argument(node, "dims")[0], rank_of(node)) == 0


def _transposes_behind(node: fx.Node) -> bool:
    return 0 not in (at(argument(node, name), rank_of(node)) for name in ("dim0", "dim1"))


_RULES: dict[str, Callable[[fx.Node], bool]] = {
    "reshape": _keeps_rows,
    "view": _keeps_rows,
    "permute": _permutes_behind,
    "transpose": _transposes_behind,
}
