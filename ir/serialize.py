"""Graphs as plain data and back: what `program.json` holds. Nothing is pickled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..spec.errors import ArtifactError
from .vocabulary import operator_name, operator_named


def graph_to_data(graph: fx.Graph) -> list[dict[str, Any]]:
    """One JSON-ready object per node, in order: name, op, target, args, kwargs."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": operator_name(node.target) if node.op == "call_function" else str(node.target),
            "args": [_encode(arg) for arg in node.args],
            "kwargs": {key: _encode(arg) for key, arg in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def graph_from_data(data: list[dict[str, Any]]) -> fx.Graph:
    """Inverse of `graph_to_data`. Raises ArtifactError for an operator outside the vocabulary or a
    reference to a node that does not exist."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data:
        args = tuple(_decode(arg, nodes) for arg in entry["args"])
        kwargs = {key: _decode(arg, nodes) for key, arg in entry["kwargs"].items()}
        if entry["op"] == "output":
            graph.output(args[0])
            continue
        is_call = entry["op"] == "call_function"
        target = operator_named(entry["target"]) if is_call else entry["target"]
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        nodes[entry["name"]] = node
    return graph


def _encode(arg: Any) -> Any:
    match arg:
        case fx.Node():
            return {"node": arg.name}
        case None | bool() | int() | str():
            return arg
        case float():
            return arg if math.isfinite(arg) else {"float": repr(arg)}
        case list() | tuple():
            return [_encode(item) for item in arg]
        case torch.dtype():
            return {"dtype": str(arg).removeprefix("torch.")}
        case torch.device():
            return {"device": arg.type}
        case torch.memory_format():
            return {"memory_format": str(arg).removeprefix("torch.")}
        case torch.layout():
            return {"layout": str(arg).removeprefix("torch.")}
        case slice():
            return {"slice": [_encode(arg.start), _encode(arg.stop), _encode(arg.step)]}
        case _:
            raise TypeError(f"{type(arg).__name__} cannot be an argument of a serialised node")


def _decode(arg: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(arg, list):
        return [_decode(item, nodes) for item in arg]
    if not isinstance(arg, dict):
        return arg
    ((kind, value),) = arg.items()
    if kind == "node":
        if value not in nodes:
            raise _damaged(f"a node refers to {value!r}, which is not defined before it")
        return nodes[value]
    if kind == "float":
        return float(value)
    if kind == "device":
        return torch.device(value)
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in value))
    if kind in ("dtype", "memory_format", "layout"):
        found = getattr(torch, value, None)
        if isinstance(found, torch.dtype | torch.memory_format | torch.layout):
            return found
    raise _damaged(f"argument {arg!r} has an unknown form")


def _damaged(why: str) -> ArtifactError:
    return ArtifactError(
        "artifact.program",
        "The stored program cannot be read.",
        f"Its graph is damaged: {why}.",
        "Compile the model again.",
    )
