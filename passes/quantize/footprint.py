"""What carrying calibration tokens through a program takes at most, before it is done: memory, and disk for
activations that memory does not hold. Arithmetic on shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from ...ir.infer import infer
from ...ir.program import Program
from ..graph import is_weight
from .rounding import BAND_WEIGHTS
from .segments import Segment, cut_segments, product_sites
from .walk import BATCH_TOKENS

_FLOAT_BYTES = 4
# Matrices [K, K] that are alive while a weight is solved for: moments, their factor, drift, and work space.
_MOMENT_MATRICES = 4
# Copies of a band of weights while it is worked on, and of what lies between two cuts while it is run.
_BAND_COPIES, _BETWEEN = 10, 2
# The tokens as they are, and as they were before anything was quantised.
_STREAMS = 2


class Footprint(NamedTuple):
    """Bytes of memory beside those of the libraries, and bytes on disk."""

    memory_bytes: int
    spilled_bytes: int


def calibration_footprint(program: Program, num_tokens: int, stream_bytes: int) -> Footprint:
    """What passes that calibrate take at most for `num_tokens` tokens through `program`, fused and not yet
    quantised; of the activations each stream keeps `stream_bytes` in memory."""
    infer(program)  # one that the compile cache remembered knows no shapes
    segments = cut_segments(program.graph, product_sites(program.graph))
    crossing = max(_row_bytes(segment.live_in) for segment in segments)
    batch = min(num_tokens, BATCH_TOKENS)
    # while a segment is gone through, a batch is held at both of its ends
    activations = crossing * (num_tokens + batch)
    kept = min(activations, stream_bytes)
    # the last segment is solved and not run: nothing comes after it
    runs = [_run_bytes(program, segment, batch) for segment in segments[:-1]]
    working = max(*runs, *(_solve_bytes(program, segment) for segment in segments), 0)
    return Footprint(_STREAMS * kept + working, _STREAMS * (activations - kept))


def _solve_bytes(program: Program, segment: Segment) -> int:
    """Weights as stored and as codes take as much as once in float32."""
    weights = _num_weights(program, segment)
    width = int(segment.x.meta["val"].shape[-1]) if segment.x is not None else 0
    bands = _BAND_COPIES * min(BAND_WEIGHTS, weights)
    return _FLOAT_BYTES * (_MOMENT_MATRICES * width * width + weights + bands)


def _run_bytes(program: Program, segment: Segment, batch: int) -> int:
    values = _BETWEEN * batch * _row_bytes(segment.nodes)
    return _FLOAT_BYTES * _num_weights(program, segment) + values


def _num_weights(program: Program, segment: Segment) -> int:
    sources = [source for node in segment.nodes for source in node.all_input_nodes if is_weight(source)]
    return sum(math.prod(program.weights[name].shape) for name in {str(node.target) for node in sources})


def _row_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of one token's rows of some values, in float32."""
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in nodes]
    return _FLOAT_BYTES * sum(math.prod(map(int, shape[1:])) for shape in shapes if shape)
