"""Which values a graph keeps, how large they are, and from where to where.

Found by running the graph on tensors without data, at the sizes of the largest step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ir.program import Program
from ..spec.arena import Buffer


def buffers_of(program: Program, sizes: Mapping[str, int]) -> tuple[Buffer, ...]:
    """One buffer per value that a node computes, its life in node indexes.

    `sizes` gives every symbol of the inputs. Views cost nothing and prolong the life of what they
    look into; weights, inputs and what they alias cost nothing here. The result lives to the end.
    """
    values = _shadow_run(program, sizes)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    buffers: dict[int, Buffer] = {}
    free = {_storage(values[node]) for node in order if node.op in ("placeholder", "get_attr")}
    for node, index in order.items():
        if node.op == "output":
            continue
        last = max((order[user] for user in node.users), default=index)
        results = values[node] if isinstance(values[node], tuple | list) else (values[node],)
        for part, value in enumerate(results):
            if not isinstance(value, Tensor) or _storage(value) in free:
                continue
            name = f"{node.name}.{part}" if len(results) > 1 else node.name
            buffers[_storage(value)] = _kept_until(buffers.get(_storage(value)), name, value, index, last)
    return tuple(buffer for buffer in buffers.values() if buffer.size_bytes)


def _kept_until(known: Buffer | None, name: str, value: Tensor, index: int, last: int) -> Buffer:
    if known is not None:
        return Buffer(
            value=known.value, size_bytes=known.size_bytes, first=known.first, last=max(known.last, last)
        )
    return Buffer(value=name, size_bytes=value.untyped_storage().nbytes(), first=index, last=last)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _shadow_run(program: Program, sizes: Mapping[str, int]) -> dict[fx.Node, Any]:
    """The value of every node on tensors that have shapes and storage identities and no data.

    All are kept until the end, so that no identity is used twice.
    """
    inputs = {entry.name: entry for entry in program.inputs}
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode(), torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                entry = inputs[str(node.target)]
                shape = [dim if isinstance(dim, int) else sizes[dim] for dim in entry.shape]
                values[node] = torch.empty(shape, dtype=getattr(torch, entry.dtype))
            elif node.op == "get_attr":
                expr = program.weights[str(node.target)]
                values[node] = torch.empty(expr.shape, dtype=expr.dtype)
            elif node.op == "call_function":
                assert callable(node.target)
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values
