"""How many bits a weight costs as stored, everything counted. Knows expressions, no graph."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..ir.program import Program
from ..ir.quantized import part_dtype, part_shape
from ..ir.weights import Coded, Expr
from ..spec.quant import QuantScheme


def bits_per_weight(program: Program) -> float:
    """Stored bits of all weights that the graph reads, per parameter that they stand for.

    Codes with their padding, scales, zero points and whatever is kept unquantised count as stored; a
    quantised weight stands for as many parameters as it had before. Tied weights count once.
    """
    names = list(program.used_weights())
    stored = 8 * sum(program.weights.num_bytes(name) for name in names)
    parameters = sum(num_parameters(program.weights[name]) for name in names)
    return stored / parameters if parameters else 0.0


def num_parameters(expr: Expr) -> int:
    """Parameters that one stored tensor stands for; scales and zero points stand for none."""
    return expr.num_parameters if isinstance(expr, Coded) else prod(expr.shape)


def coded_bytes(shape: Sequence[int], scheme: QuantScheme) -> int:
    """Stored bytes of a weight `[..., N, K]` in `scheme`: codes with padding, scales, zero points."""
    parts = ("codes", "scales") if scheme.symmetric else ("codes", "scales", "zeros")
    return sum(
        prod(part_shape(tuple(shape), scheme, part)) * part_dtype(scheme, part).itemsize for part in parts
    )
