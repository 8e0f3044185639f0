"""Cut a graph where quantised products stand, so that it can be run piece by piece over many tokens.

    … add_rms_norm │ linear → rope → attention │ linear → add_rms_norm │ linear → gated_activation │ linear …

Each segment starts with products of one input, which is then among the values that cross the cut; a mixture
of experts starts one of its own, since its choices must cross as well. Knows
which values depend on tokens; knows no layer names and no numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..fuse_linears import LINEAR
from ..graph import argument, calls, is_call
from .replace import MOE


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of the graph: `sites` are its products of one input `x`, `nodes` all that is computed in it,
    in order; `live_in` the values from before that it or a later segment reads."""

    index: int
    x: fx.Node | None
    sites: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    live_in: tuple[fx.Node, ...]


def product_sites(graph: fx.Graph) -> list[fx.Node]:
    """The linears and mixtures of experts of a graph."""
    return calls(graph, LINEAR, MOE)


def cut_segments(graph: fx.Graph, sites: Sequence[fx.Node]) -> list[Segment]:
    """The segments of `graph`, in order; the first starts with the inputs and may have no site."""
    wanted, data = frozenset(sites), token_values(graph)
    inputs: list[fx.Node | None] = [None]
    place: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node not in data:
            continue
        if node in wanted and (is_call(node, MOE) or argument(node, "x") is not inputs[-1]):
            inputs.append(argument(node, "x"))
        place[node] = place[node.args[0]] if _is_part(node) else len(inputs) - 1
    own = [[node for node in place if place[node] == index] for index in range(len(inputs))]
    live = _live_values(graph, place, len(inputs))
    return [
        Segment(index, x, tuple(n for n in own[index] if n in wanted), tuple(own[index]), tuple(live[index]))
        for index, x in enumerate(inputs)
    ]


def token_values(graph: fx.Graph) -> set[fx.Node]:
    """Calls whose values depend on the tokens, and not on positions and constants alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(_is_tokens(source) or source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_tokens(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.target == "input_ids"


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes one result of an operator that has several: it belongs where that is."""
    return getattr(node.target, "__name__", "") == "getitem"


def _live_values(graph: fx.Graph, place: dict[fx.Node, int], count: int) -> list[list[fx.Node]]:
    """For each segment the values of earlier ones that are still read in it or later, in graph order."""
    live: list[list[fx.Node]] = [[] for _ in range(count)]
    for node, index in place.items():
        last = max((place.get(user, count - 1) for user in node.users), default=index)
        for later in range(index + 1, last + 1):
            live[later].append(node)
    return live
