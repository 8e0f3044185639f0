"""What a program is: an fx graph over a listed vocabulary, lazy weights, facts and plans. Immutable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..spec.cache import CacheLayout
from ..spec.history import PassRecord
from ..spec.model import ModelSpec
from ..spec.plans import CapturePlan, MemoryPlan
from .weights import WeightStore


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """A placeholder of the graph. A dimension is a number, or the name of a symbol: T tokens of the
    step, L rows whose logits are wanted, S sequences, Bg block-table entries of cache group g, Pg its pages.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


TRACE_INPUTS = (
    GraphInput(name="input_ids", shape=("T",), dtype="int64"),
    GraphInput(name="positions", shape=("T",), dtype="int64"),
    GraphInput(name="out_rows", shape=("L",), dtype="int64"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """One model at one stage of compilation; a pass returns a new one.

    `graph` has one placeholder per entry of `inputs`, in that order, `get_attr` nodes whose target is a
    name in `weights`, `call_function` nodes over the listed vocabulary, and one output: logits
    `[L, vocab]`. Every node but the output carries `meta["val"]` (a fake tensor with symbolic T, a
    symbolic int, or a tuple of these) once `ir.infer.infer` has run. `facts` are what
    passes have established and others require.
    """

    graph: fx.Graph
    inputs: tuple[GraphInput, ...]
    weights: WeightStore
    spec: ModelSpec
    facts: frozenset[str] = frozenset()
    cache: CacheLayout | None = None
    memory: MemoryPlan | None = None
    capture: CapturePlan | None = None
    history: tuple[PassRecord, ...] = ()

    def replace(self, **changes: Any) -> Program:
        """This program with some fields changed."""
        return replace(self, **changes)

    def copy_graph(self) -> fx.Graph:
        """A copy of the graph that may be edited; node order, names and meta are kept."""
        return copy_graph(self.graph)

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph, placeholders and output included."""
        return len(self.graph.nodes)

    def used_weights(self) -> Iterator[str]:
        """Names of the weights the graph reads, in order of first use, each once."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(str(node.target))
                yield str(node.target)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """An independent copy of `graph`."""
    copy = fx.Graph()
    result = copy.graph_copy(graph, {})
    copy.output(result)
    return copy
