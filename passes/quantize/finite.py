"""Weights as numbers: evaluated, and refused where they are none, by the name of the stored tensor."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...ir.program import Program
from ...ir.weights import Source
from ...spec.errors import ModelError
from .solved import leaves


def finite_weight(program: Program, name: str) -> Tensor:
    """The values of weight `name` as stored. Raises ModelError naming the tensor that holds NaN or
    infinity."""
    value = program.weights.evaluate(name)
    if not value.is_floating_point() or bool(value.isfinite().all()):
        return value
    bad = name
    for leaf in leaves(program.weights[name]):
        if isinstance(leaf, Source) and not bool(leaf.evaluate(program.weights.reader).isfinite().all()):
            bad = f"{leaf.key} in {Path(leaf.path).name}"
            break
    raise ModelError(
        "model.not_finite",
        f"Weight {bad} holds values that are no numbers.",
        f"{int((~value.isfinite()).sum())} values of {name} are NaN or infinite, and cannot be rounded.",
        "Restore the checkpoint from where it came from, or check how it was converted.",
    )
