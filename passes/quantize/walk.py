"""Carry calibration tokens through a program segment by segment, each fed by what came before it.

Computes in float32 whatever the program's dtype. At any time one segment's weights are in memory, and of the
activations what the store holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir import ops as _registered  # noqa: F401 # pyright: ignore[reportUnusedImport] - registers them
from ...ir.finite import all_finite
from ...ir.program import Program
from ...spec.errors import ModelError
from ..calibration import Calibration
from ..fuse_linears import ATTENTION, LINEAR
from .activations import ActivationStore
from .segments import Segment, cut_segments

# What an operator gives for so many tokens is small enough for the C library to use its memory again; what it
# gives for 2048 was mapped and cleared anew each time, which took an eighth of all seconds.
BATCH_TOKENS = 512
_LOW = frozenset({torch.bfloat16, torch.float16})


class Walk:
    """Calibration activations on their way through a program. Segments are visited in order: look at the
    inputs of one, then advance over it, with some of its weights replaced."""

    def __init__(self, program: Program, sites: Sequence[fx.Node], calibration: Calibration) -> None:
        self.segments = cut_segments(program.graph, sites)
        self._program = program
        self._batches = make_batches(calibration.sequences)
        self._store = ActivationStore(calibration.folder, calibration.memory_bytes)

    def values(self, node: fx.Node) -> Iterator[Tensor]:
        """A live value of the segment that comes next, batch by batch."""
        for batch in range(len(self._batches)):
            yield self._store.look(batch, node.name)

    def outputs(self, segment: Segment, weights: Mapping[str, Tensor], batch: int) -> dict[fx.Node, Any]:
        """What `segment`, the next one, gives for one batch with `weights` in place of its own."""
        known: dict[fx.Node, Any] = {node: self._store.look(batch, node.name) for node in segment.live_in}
        return run_nodes(segment.nodes, known, self._batches[batch], self._reader(weights))

    def advance(self, segment: Segment, weights: Mapping[str, Tensor]) -> None:
        """Run `segment`, which comes next, with `weights` in place of the program's own of these names.

        Raises ModelError when a value that goes on is not finite.
        """
        following = segment.index + 1
        live_out = self.segments[following].live_in if following < len(self.segments) else ()
        read = self._reader(weights)
        for batch, inputs in enumerate(self._batches):
            known: dict[fx.Node, Any] = {n: self._store.take(batch, n.name) for n in segment.live_in}
            if not live_out:
                continue
            values = run_nodes(segment.nodes, known, inputs, read)
            for node in live_out:
                _check_finite(node, values[node])
            self._store.put(batch, {node.name: values[node] for node in live_out})

    def close(self) -> None:
        """Give up what is kept, files included."""
        self._store.close()

    def _reader(self, weights: Mapping[str, Tensor]) -> Any:
        kept: dict[str, Tensor] = dict(weights)

        def read(name: str) -> Tensor:
            if name not in kept:
                kept[name] = raised(self._program.weights.evaluate(name))
            return kept[name]

        return read


def make_batches(sequences: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Graph inputs of steps that hold as many whole sequences as fit in a bounded number of tokens."""
    groups: list[list[Sequence[int]]] = []
    used = BATCH_TOKENS
    for sequence in sequences:
        if used + len(sequence) > BATCH_TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += len(sequence)
    return [packed_inputs(group) for group in groups]


def packed_inputs(group: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Graph inputs of one step of whole sequences, logits wanted of every token."""
    tokens = [token for sequence in group for token in sequence]
    return {
        "input_ids": torch.tensor(tokens),
        "positions": torch.cat([torch.arange(len(sequence)) for sequence in group]),
        "out_rows": torch.arange(len(tokens)),
    }


def run_nodes(
    nodes: Sequence[fx.Node],
    known: Mapping[fx.Node, Any],
    inputs: Mapping[str, Tensor],
    weight: Callable[[str], Tensor],
    faster: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    *,
    gradients: bool = False,
) -> dict[fx.Node, Any]:
    """The values of `nodes` in float32, with those of `known`; tables of positions are computed where they
    are read. `faster` has functions to call in place of operators. With `gradients` those of weights are
    kept track of."""
    run = _Run(known, inputs, weight, faster)
    with torch.set_grad_enabled(gradients):
        for node in nodes:
            run.value(node)
    return run.values


class _Run:
    """Values by node, found as they are asked for. Functions that call each other would be a cycle, and keep
    the values of a step until garbage is next collected: gigabytes, where steps are large."""

    def __init__(
        self,
        known: Mapping[fx.Node, Any],
        inputs: Mapping[str, Tensor],
        weight: Callable[[str], Tensor],
        faster: Mapping[Any, Callable[..., Any]],
    ) -> None:
        self.values = dict(known)
        self._inputs = inputs
        self._weight = weight
        self._faster = faster

    def value(self, node: fx.Node) -> Any:
        """What `node` gives."""
        if node.op == "get_attr":
            return self._weight(str(node.target))
        if node not in self.values:
            is_input = node.op == "placeholder"
            self.values[node] = self._inputs[str(node.target)] if is_input else self._call(node)
        return self.values[node]

    def _call(self, node: fx.Node) -> Any:
        args: tuple[Any, ...] = fx.map_arg(node.args, self.value)
        kwargs: dict[str, Any] = fx.map_arg(node.kwargs, self.value)
        kwargs = {key: torch.float32 if arg in _LOW else arg for key, arg in kwargs.items()}
        if node.target in self._faster:
            return self._faster[node.target](*args, **kwargs)
        if node.target is LINEAR:
            return F.linear(*args, **kwargs)
        if node.target is ATTENTION and is_plain(args):
            return plain_attention(*args[:4], scale=args[7])
        assert callable(node.target)
        return node.target(*args, **kwargs)


def is_plain(args: Sequence[Any]) -> bool:
    """Whether an attention has neither sinks nor window, soft cap or chunks."""
    return len(args) == 11 and args[4] is None and not any(args[8:])


def plain_attention(q_THD: Tensor, k_TGD: Tensor, v_TGV: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causal attention by torch's own kernel, sequence by sequence."""
    starts = (positions == 0).nonzero()[:, 0].tolist()
    parts: list[Tensor] = []
    for start, stop in zip(starts, (*starts[1:], len(positions)), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGV))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def raised(value: Tensor) -> Tensor:
    """A tensor of low precision as float32, any other as it is."""
    return value.float() if value.dtype in _LOW else value


def _check_finite(node: fx.Node, value: Any) -> None:
    if isinstance(value, Tensor) and not all_finite(value):
        raise ModelError(
            "calibration.not_finite",
            f"The activations of {node.name} are not finite.",
            "Calibration runs the model on real tokens, and some value overflowed or was never a number.",
            "Check the weights (`llmc inspect MODEL`), or calibrate on other text.",
        )
