"""Where the values of a program's nodes lie in the ONNX graph that was made of it. For finding faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...ir.infer import infer
from ...ir.program import Program
from ...spec.errors import ArtifactError
from .forms import chosen_activations, stored_forms, stored_store
from .graph import StoredTensor
from .lowered import Export, lower_nodes
from .options import OnnxOptions
from .stored import StoredWeights


class GraphOperator(NamedTuple):
    """One operator of a graph as it is stored."""

    kind: str
    name: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTap:
    """The value of the graph that holds what a node of the portable program computes, and the operator that
    makes it, by kind and name."""

    node: str
    value: str
    operator: str


def graph_taps(
    portable: Program, final: Program, options: OnnxOptions, operators: Sequence[GraphOperator]
) -> tuple[GraphTap, ...]:
    """The nodes of `portable` whose values the engine's graph has, in order; `operators` are those of that
    graph as an artifact holds it. They are known by their kinds and order: names have scopes
    of the traced model, of which a stored program knows less.

    Raises ArtifactError where the graph is not the one of this program.
    """
    infer(portable)
    store = stored_store(portable.weights, stored_forms(portable, options.contrib))
    nowhere = {name: StoredTensor("", 0, store.num_bytes(name)) for name in store}
    export = Export(contrib=options.contrib, logits="rows", activations=chosen_activations(final))
    model, values = lower_nodes(portable, StoredWeights(store, nowhere), export, {})
    nodes = list(model.graph)
    expected = [(node.op_type, len(node.outputs)) for node in nodes]
    if [(each.kind, len(each.outputs)) for each in operators] != expected:
        raise ArtifactError(
            "artifact.onnx_graph",
            "The graph of this artifact is not what this llmc exports for its program.",
            f"It has {len(operators)} operators, {len(nodes)} are expected, and their kinds differ.",
            "Compile the model again with this version of llmc, then trace it.",
        )
    makers = dict(zip(nodes, operators, strict=True))
    taps: list[GraphTap] = []
    for node, value in values.items():
        producer, index = value.producer(), value.index()
        assert producer is not None, "values that have a node's tensor are outputs"
        assert index is not None
        maker = makers[producer]
        taps.append(
            GraphTap(node=node.name, value=maker.outputs[index], operator=f"{maker.kind} {maker.name}")
        )
    return tuple(taps)
