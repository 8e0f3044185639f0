"""Weights as numbers: evaluated, and refused where they are none, by the name of the stored tensor."""

from __future__ import annotations

from torch import Tensor

from ...ir.program import Program
from ...ir.weights import finite_values


def finite_weight(program: Program, name: str) -> Tensor:
    """The values of weight `name` as stored. Raises ModelError naming the tensor that holds NaN or
    infinity."""
    return finite_values(program.weights[name], program.weights.reader, name)
