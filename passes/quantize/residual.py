"""What reads and what writes the residual stream, and which values attention carries: what `rotate` turns.

    embedding → stream;  add(stream, y), add_rms_norm(stream, y) → stream;  rms_norm(stream) → linears

Asked of the graph, and answered with a reason where a model does not admit it. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from ...ir.program import Program
from ..fuse_linears import ATTENTION, LINEAR
from ..graph import argument, calls, is_call, is_weight
from ..rewrite import operator_of
from .replace import MOE

EMBEDDING = torch.ops.llmc.embedding.default
_GATHER = torch.ops.llmc.gather_rows.default
_RMS_NORM = torch.ops.llmc.rms_norm.default
_ADD_RMS_NORM = torch.ops.llmc.add_rms_norm.default
_CASTS = frozenset({"_to_copy", "to", "clone", "contiguous", "alias"})


class NotRotatable(Exception):
    """The model does not admit a rotation; the text says why, as a sentence."""


class Read(NamedTuple):
    """A weight that multiplies the normed stream by its last dimension, and the norm between."""

    user: fx.Node
    weight: fx.Node
    norm: fx.Node


class Write(NamedTuple):
    """A weight or bias whose dimension `dim` goes into the stream."""

    weight: fx.Node
    dim: int


@dataclass(slots=True)
class Stream:
    """All that touches the residual stream."""

    norms: list[fx.Node] = field(default_factory=list[fx.Node])
    reads: list[Read] = field(default_factory=list[Read])
    writes: list[Write] = field(default_factory=list[Write])


class Heads(NamedTuple):
    """What carries values through attention, a head of `size` after the other: `writes` are rows `start` to
    `stop` of weights and biases, `reads` the weights behind attention."""

    size: int
    writes: tuple[tuple[fx.Node, int, int], ...]
    reads: tuple[fx.Node, ...]


def residual_stream(graph: fx.Graph) -> Stream:
    """The residual stream of `graph`. Raises NotRotatable for one that something other than RMS norms reads
    or other than products and tables writes."""
    walk = _Walk()
    for node in calls(graph, EMBEDDING):
        walk.write(node)
    while walk.pending:
        value = walk.pending.pop()
        for user in value.users:
            walk.visit(value, user)
    if not walk.found.norms:
        raise NotRotatable("No RMS norm reads the token embedding.")
    for node in walk.written:
        strange = [user for user in node.users if user not in walk.stream and user not in walk.written]
        if strange:
            raise NotRotatable(f"{strange[0].name} reads {node.name} beside the residual stream.")
    return walk.found


class _Walk:
    """Follows the stream; `stream` are its values and what makes them, `written` what goes into it."""

    def __init__(self) -> None:
        self.found = Stream()
        self.stream: dict[fx.Node, None] = {}
        self.written: dict[fx.Node, None] = {}
        self.pending: list[fx.Node] = []

    def write(self, node: fx.Node) -> None:
        """Note the weights that make `node`, whose result goes into the stream."""
        if node in self.stream or node in self.written:
            return
        self.written[node] = None
        if is_call(node, EMBEDDING):
            self._note(argument(node, "weight"), 1, node)
            self._join(node)
        elif is_call(node, LINEAR):
            self._note(argument(node, "weight"), 0, node)
            self._note_bias(argument(node, "bias"), 0, node)
        elif is_call(node, MOE):
            self._note(argument(node, "down"), 1, node)
            self._note_bias(argument(node, "down_bias"), 1, node)
        elif is_call(node, _GATHER) or operator_of(node) in _CASTS:
            self.write(argument(node, "x") if is_call(node, _GATHER) else node.all_input_nodes[0])
        elif operator_of(node) == "add":
            for part in node.all_input_nodes:
                self.write(part)
        elif (scaled := _scaled_by_number(node)) is not None:
            self.write(scaled)
        else:
            raise NotRotatable(f"{node.name} ({operator_of(node)}) goes into the residual stream.")

    def visit(self, value: fx.Node, user: fx.Node) -> None:
        """Follow one reader of a value of the stream."""
        if user in self.stream:
            return
        if is_call(user, _RMS_NORM):
            self._norm(user, user)
        elif is_call(user, _ADD_RMS_NORM):
            for part in (argument(user, "x"), argument(user, "residual")):
                self._operand(part)
            self.stream[user] = None
            for part in user.users:
                if part.args[1] == 0:
                    self._norm(user, part)
                else:
                    self._join(part)
        elif operator_of(user) == "add":
            for part in user.args[:2]:
                self._operand(part)
            self._join(user)
        elif is_call(user, _GATHER) or operator_of(user) in _CASTS or _scaled_by_number(user) is value:
            self._join(user)
        else:
            raise NotRotatable(f"{user.name} ({operator_of(user)}) reads the residual stream.")

    def _operand(self, part: Any) -> None:
        """What is added to the stream is of the stream, or has to be written by something that turns."""
        if not isinstance(part, fx.Node):
            raise NotRotatable("A number is added to the residual stream.")
        if part not in self.stream:
            self.write(part)

    def _join(self, node: fx.Node) -> None:
        if node not in self.stream:
            self.stream[node] = None
            self.pending.append(node)

    def _norm(self, norm: fx.Node, value: fx.Node) -> None:
        self.stream[norm] = None
        self.found.norms.append(norm)
        self._read(norm, value)

    def _read(self, norm: fx.Node, value: fx.Node) -> None:
        for user in value.users:
            if is_call(user, _GATHER) or operator_of(user) in _CASTS:
                self._read(norm, user)
            elif is_call(user, LINEAR) or is_call(user, MOE):
                name = "weight" if is_call(user, LINEAR) else "gate_up"
                weight = argument(user, name)
                if not is_weight(weight) or argument(user, "x") is not value:
                    raise NotRotatable(f"{user.name} has no weight of its own to turn.")
                self.found.reads.append(Read(user, weight, norm))
            else:
                raise NotRotatable(f"{user.name} ({operator_of(user)}) reads the normed stream.")

    def _note(self, weight: Any, dim: int, reader: fx.Node) -> None:
        if not is_weight(weight):
            raise NotRotatable(f"The weight of {reader.name} is computed in the graph.")
        self.found.writes.append(Write(weight, dim))

    def _note_bias(self, bias: Any, dim: int, reader: fx.Node) -> None:
        if bias is not None:
            self._note(bias, dim, reader)


def _scaled_by_number(node: fx.Node) -> fx.Node | None:
    """What `node` multiplies or divides by one number; None when it does something else."""
    if operator_of(node) not in ("mul", "div") or not isinstance(node.args[0], fx.Node):
        return None
    factor: Any = node.args[1]
    if isinstance(factor, (int, float)):
        return node.args[0]
    return node.args[0] if is_weight(factor) and factor.meta["val"].numel() == 1 else None


def value_heads(graph: fx.Graph, program: Program) -> list[Heads]:
    """What carries values through each attention. Raises NotRotatable where they are more than a product of a
    weight, or read by more than products."""
    found: list[Heads] = []
    for attention in calls(graph, ATTENTION):
        value: fx.Node = argument(attention, "v")
        size = int(value.meta["val"].shape[-1])
        _only_values(value, attention)
        writes = _value_rows(value, size, attention)
        found.append(Heads(size, writes, _output_weights(attention, size)))
    if not found:
        raise NotRotatable("The model has no attention.")
    return found


def _only_values(value: fx.Node, attention: fx.Node) -> None:
    for user in value.users:
        others = [argument(user, name) for name in ("q", "k")] if is_call(user, ATTENTION) else [value]
        if value in others:
            raise NotRotatable(f"{user.name} reads the values of {attention.name} as more than values.")


def _value_rows(value: fx.Node, size: int, attention: fx.Node) -> tuple[tuple[fx.Node, int, int], ...]:
    """The rows of weight and bias that make `value`, behind reshapes and slices of one product."""
    start, node = 0, value
    stop: int | None = None
    while not is_call(node, LINEAR):
        kind = operator_of(node)
        source: Any = node.args[0] if node.args else None
        if kind in ("reshape", "view") and _keeps_order(node, source):
            node = source
        elif kind == "slice" and len(node.args) == 4 and node.args[1] == 1 and stop is None:
            start, stop = int(node.args[2]), int(node.args[3])  # pyright: ignore[reportArgumentType]
            node = source
        else:
            raise NotRotatable(f"The values of {attention.name} are made by {node.name} ({kind}).")
        if stop is None and len(node.users) > 1:
            raise NotRotatable(f"More than {attention.name} reads {node.name}, which gives its values.")
    stop = int(node.meta["val"].shape[-1]) if stop is None else stop
    parts = [argument(node, "weight"), argument(node, "bias")]
    if not is_weight(parts[0]) or (stop - start) % size:
        raise NotRotatable(f"The values of {attention.name} are no rows of a weight.")
    return tuple((part, start, stop) for part in parts if part is not None)


def _output_weights(attention: fx.Node, size: int) -> tuple[fx.Node, ...]:
    weights: list[fx.Node] = []
    pending = list(attention.users)
    while pending:
        node = pending.pop()
        if operator_of(node) in ("reshape", "view") and _keeps_order(node, attention):
            pending.extend(node.users)
        elif is_call(node, LINEAR) and is_weight(argument(node, "weight")):
            weights.append(argument(node, "weight"))
        else:
            raise NotRotatable(f"{node.name} ({operator_of(node)}) reads what {attention.name} gives.")
    return tuple(weights)


def _keeps_order(node: fx.Node, source: Any) -> bool:
    """Whether a reshape of tokens leaves each token's elements in order: its first size stays."""
    return isinstance(source, fx.Node) and str(node.meta["val"].shape[0]) == str(source.meta["val"].shape[0])


def shared_weights(weights: Sequence[fx.Node]) -> set[str]:
    """Names of those that more than one call reads."""
    return {str(node.target) for node in weights if len(node.users) > 1}
