"""Codes of the linears that share one input, by the second moments of that input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...spec.history import LayerError
from ...spec.quant import QuantScheme
from ..graph import argument
from .finite import finite_weight
from .moments import Drift, SecondMoments
from .propagation import DAMPING, Propagation
from .rounding import Method, Rounded, round_matrix
from .selection import Choice, scheme_of
from .solved import Result
from .walk import Walk

# Some rows of what a weight would have to move by to undo the drift of its inputs (see `Drift`):
# `weight @ d.T @ x @ inverse(gram)`. All at once would be as large as the weight in float32.
Pull = Callable[[slice, Propagation], Tensor]


class Streams(NamedTuple):
    """The calibration tokens on their way through what is quantised so far, and through the program as it
    was; None when nobody asks for that."""

    now: Walk
    before: Walk | None


def solve_linears(
    program: Program,
    streams: Streams,
    linears: Sequence[fx.Node],
    choices: Mapping[str, Choice],
    method: Method,
) -> dict[str, Result]:
    """Results for the weights of `linears`, which read one value, in the segment that comes next in both
    streams."""
    x: fx.Node = argument(linears[0], "x")
    names = dict.fromkeys(str(argument(linear, "weight").target) for linear in linears)
    weights = {name: finite_weight(program, name) for name in names}
    width = next(iter(weights.values())).shape[-1]
    moments = SecondMoments(width)
    for value in streams.now.values(x):
        moments.observe(value.reshape(-1, width))
    inputs = Inputs(moments.gram(), method)
    pulls = _pulls(streams, x, weights) if streams.before is not None else {}
    return {
        name: inputs.solve(name, weight, scheme_of(choices[name]), pulls.get(name))
        for name, weight in weights.items()
    }


def _pulls(streams: Streams, x: fx.Node, weights: Mapping[str, Tensor]) -> dict[str, Pull]:
    """How each weight would have to move."""
    assert streams.before is not None
    counts = [weight.shape[0] for weight in weights.values()]
    width = next(iter(weights.values())).shape[1]
    small = sum(counts) < width
    drift = Drift(width, torch.cat([weight.float() for weight in weights.values()]) if small else None)
    for now, before in zip(streams.now.values(x), streams.before.values(x), strict=True):
        drift.observe(now.reshape(-1, width), before.reshape(-1, width))
    if not small:
        moved = _Moved(drift)
        return {name: partial(moved.rows, weight) for name, weight in weights.items()}
    parts = drift.pull(torch.empty(0, width)).split(counts)
    return {name: partial(_solved, part) for name, part in zip(weights, parts, strict=True)}


def _solved(part_NK: Tensor, rows: slice, propagation: Propagation) -> Tensor:
    return propagation.solve(part_NK[rows])


class _Moved:
    """The drift of inputs as all weights that read them would have to move, `d.T @ x @ inverse(gram)`: found
    once for many rows."""

    def __init__(self, drift: Drift) -> None:
        self._drift = drift
        self._found_KK: Tensor | None = None

    def rows(self, weight_NK: Tensor, rows: slice, propagation: Propagation) -> Tensor:
        """Some rows of one of these weights."""
        if self._found_KK is None:
            self._found_KK = propagation.solve(self._drift.mean())
        return weight_NK[rows].float() @ self._found_KK


class Inputs:
    """What is known of the inputs of some products, ready for any number of matrices."""

    def __init__(self, gram_KK: Tensor, method: Method) -> None:
        self._method = method
        self._active = bool(gram_KK.diagonal().any())
        self._gram = gram_KK if self._active else None
        self._propagation = Propagation(gram_KK) if self._active and method.propagate else None

    def solve(self, name: str, weight_NK: Tensor, scheme: QuantScheme, pull: Pull | None = None) -> Result:
        """The codes of one matrix, and what there is to say; `pull` is the drift of its inputs."""
        target = self._target(weight_NK, pull)
        rounded = round_matrix(weight_NK, scheme, self._method, self._gram, self._propagation, target)
        error = LayerError(subject=name, error=rounded.error, nearest_error=rounded.nearest_error)
        return Result(rounded.tensor, error, self._note(rounded))

    def _target(self, weight_NK: Tensor, pull: Pull | None) -> Callable[[slice], Tensor] | None:
        """Rows of weights that would give on inputs as they are what these gave on inputs as they were, or of
        the part of the way there that the method goes (GPTAQ, Li et al. 2025; QEP, Arai & Ichikawa 2025)."""
        propagation = self._propagation
        if pull is None or propagation is None or propagation.damping is None:
            return None
        part = self._method.catch_up
        return lambda rows: weight_NK[rows].float() + part * pull(rows, propagation)

    def _note(self, rounded: Rounded) -> str:
        notes: list[str] = []
        if not self._active:
            notes.append("no calibration token activated it, so it was rounded by the weights alone")
        if self._propagation is not None:
            damping, num_dead = self._propagation.damping, self._propagation.num_dead
            if damping is None:
                notes.append(
                    f"its inputs are singular even with a damping of {DAMPING[-1]:g}: no error propagation"
                )
            elif damping > DAMPING[0]:
                notes.append(f"its inputs are nearly singular and took a damping of {damping:g}")
            if num_dead:
                notes.append(f"{num_dead} of its inputs were never active")
        if rounded.num_nearest:
            notes.append(f"rounding to nearest was best for {rounded.num_nearest} rows")
        return "; ".join(notes)
