"""From a portable Program to an ONNX model and its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import fx

from ...ir.program import Program
from ...spec.model import ModelSpec
from .emitter import Emitter
from .frame import Frame
from .graph import OnnxGraph
from .lower.table import lowerings
from .stored import StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an ONNX model is made for: `contrib` as in `OnnxOptions`, `logits` as in `frame.Frame`,
    `activations` as in `emitter.Emitter`."""

    contrib: bool = True
    logits: str = "last"
    activations: Mapping[str, str] = field(default_factory=dict[str, str])


def lower(program: Program, stored: StoredWeights, export: Export, facts: Mapping[str, str]) -> ir.Model:
    """The model of a program before the lay-out stage; `facts` become its metadata.

    Raises TargetError naming the operator, and the module it is from, where one has no ONNX form.
    """
    return lower_nodes(program, stored, export, facts)[0]


def lower_nodes(
    program: Program, stored: StoredWeights, export: Export, facts: Mapping[str, str]
) -> tuple[ir.Model, dict[fx.Node, ir.Value]]:
    """As `lower`, with the value of the model that holds each node's tensor, in whatever shape; nodes that an
    operator computes inside have none."""
    graph = OnnxGraph()
    frame = Frame(program.spec, export.contrib, export.logits)
    frame.open(graph)
    emitter = Emitter(program, graph, frame, stored, export.contrib, export.activations)
    logits = emitter.run(lowerings())
    outputs = frame.close(graph, logits, logits in emitter.batched)
    model = graph.finish(outputs, program.spec.architecture, facts)
    made = {value for node in model.graph for value in node.outputs}
    values: dict[fx.Node, ir.Value] = {}
    for node, value in emitter.env.items():
        if not isinstance(value, ir.Value):
            continue
        held = next((each for each in (graph.base(value), value) if each in made), None)
        if held is not None:
            values[node] = held
    return model, values


def serialize(model: ir.Model) -> bytes:
    """The bytes of the model file, the same for equal models; weights stay where they are."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def cache_widths(spec: ModelSpec, contrib: bool) -> list[dict[str, Any]]:
    """Layer, KV heads and widths of every cache, in the order of the graph's inputs."""
    frame = Frame(spec, contrib, "last")
    return [
        {
            "layer": layer.layer,
            "num_kv_heads": layer.num_kv_heads,
            "k_dim": frame.widths(layer)[0],
            "v_dim": frame.widths(layer)[1],
        }
        for layer in frame.owners()
    ]
