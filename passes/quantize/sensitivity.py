"""How much rounding some weights alone changes what a program says: the mean KL divergence of its logits.

The tokens run through the program once; each trial starts at the segment that first reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...spec.errors import ModelError
from ..calibration import Calibration
from ..graph import weight_nodes
from .segments import cut_segments, product_sites
from .walk import packed_inputs, raised, run_nodes

_NUM_PIECES = 8
_KEPT_WEIGHT_BYTES = 1 << 30
# Log-probabilities are compared in float64, this many logits at a time.
_BAND_LOGITS = 4 << 20


def judged_pieces(calibration: Calibration, num_tokens: int) -> list[tuple[int, ...]]:
    """Starts of calibration sequences spread over all of them, about `num_tokens` tokens altogether and
    never more."""
    sequences = calibration.sequences
    count = min(_NUM_PIECES, len(sequences))
    spread = [sequences[index * len(sequences) // count] for index in range(count)]
    pieces: list[tuple[int, ...]] = []
    left = num_tokens
    for index, sequence in enumerate(spread):
        pieces.append(tuple(sequence[: left // (count - index)]))
        left -= len(pieces[-1])
    return [piece for piece in pieces if piece]


class Sensitivity:
    """A program on a few tokens, ready for trials. Computes in float32. Keeps what crosses its cuts and the
    logits of every token. Raises ModelError when these are not finite."""

    def __init__(self, program: Program, pieces: Sequence[Sequence[int]]) -> None:
        self._program = program
        self._inputs = packed_inputs(pieces)
        self._segments = cut_segments(program.graph, product_sites(program.graph))
        self._kept: dict[str, Tensor] = {}
        self._keeps = program.weights.total_bytes <= _KEPT_WEIGHT_BYTES
        output = next(node for node in program.graph.nodes if node.op == "output")
        self._logits: fx.Node = output.args[0]
        self._live: list[dict[fx.Node, Any]] = []
        self._reference = self._run(0, {}, self._live)
        if not bool(self._reference.isfinite().all()):
            raise ModelError(
                "calibration.not_finite",
                "The logits on calibration tokens are not finite.",
                "Calibration runs the model on real tokens, and some value overflowed or was never a number.",
                "Check the weights (`llmc inspect MODEL`), or calibrate on other text.",
            )

    @property
    def num_tokens(self) -> int:
        """Tokens whose logits are compared."""
        return len(self._inputs["input_ids"])

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """Mean KL divergence, in nats, of the logits with `weights` in place of the program's own."""
        found = self._run(min(self._first(name) for name in weights), weights, [])
        size = max(1, _BAND_LOGITS // found.shape[-1])
        total = 0.0
        for was, became in zip(self._reference.split(size), found.split(size), strict=True):
            p, q = (torch.log_softmax(rows.double(), -1) for rows in (was, became))
            total += float((p.exp() * (p - q)).sum())
        return total / len(found)

    def _first(self, name: str) -> int:
        users = set(weight_nodes(self._program.graph)[name].users)
        own = (segment.index for segment in self._segments if not users.isdisjoint(segment.nodes))
        return next(own, 0)  # tables of positions are computed where they are read

    def _run(self, first: int, weights: Mapping[str, Tensor], live: list[dict[fx.Node, Any]]) -> Tensor:
        """The logits, from segment `first` on; what each segment starts with is added to `live`."""
        values: dict[fx.Node, Any] = dict(self._live[first]) if first else {}
        for segment in self._segments[first:]:
            live.append({node: values[node] for node in segment.live_in})
            values = run_nodes(segment.nodes, live[-1], self._inputs, self._reader(weights))
        return values[self._logits]

    def _reader(self, weights: Mapping[str, Tensor]) -> Any:
        once: dict[str, Tensor] = self._kept if self._keeps else {}

        def read(name: str) -> Tensor:
            if name in weights:
                return weights[name]
            if name not in once:
                once[name] = raised(self._program.weights.evaluate(name))
            return once[name]

        return read
