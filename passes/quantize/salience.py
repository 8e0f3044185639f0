"""Which scales of inputs make matrices cost least when they are rounded (AWQ, Lin et al. 2023).

Columns that meet large inputs are made larger before rounding, by a power of how large; a grid over the power
is judged by the error of the outputs, inputs taken as independent. Scales are powers of two, so that moving
them changes no value. Tensors in, tensors out; shape letters as in `grid`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.quant import QuantScheme
from .grid import nearest_codes, rtn_grid, values_of

# Rows of a weight that are looked at: scales are of columns, so rows spread over all tell as much.
_MOST_ROWS = 512


class Salience(NamedTuple):
    """The best scales `[K]`, the exponent they came from (0: all ones), and the error with and without, as
    parts of the output's power."""

    scales: Tensor
    exponent: float
    error: float
    plain_error: float


def search_salience(
    weights: Sequence[Tensor], power_K: Tensor, scheme: QuantScheme, *, steps: int
) -> Salience:
    """Scales for the columns of `weights` `[N, K]`, which share inputs of mean square `power`.

    Not finite errors count as the worst there are, so that the exponent falls back to 0.
    """
    ones = torch.ones_like(power_K)
    weights = [weight[:: -(-weight.shape[0] // _MOST_ROWS)] for weight in weights]
    plain = _error(weights, ones, power_K, scheme)
    best = Salience(ones, 0.0, plain, plain)
    for step in range(1, steps + 1):
        exponent = step / steps
        scales = power_of_two_scales(power_K, exponent)
        error = _error(weights, scales, power_K, scheme)
        if error < best.error:
            best = Salience(scales, exponent, error, plain)
    return best


def power_of_two_scales(power_K: Tensor, exponent: float) -> Tensor:
    """Root mean squares to the `exponent`, about 1 in the middle, as powers of two; 1 for silent inputs."""
    active = power_K > 0
    if not bool(active.any()):
        return torch.ones_like(power_K)
    logs = 0.5 * exponent * torch.log2(torch.where(active, power_K, torch.ones_like(power_K)))
    middle = logs[active].median()
    return torch.where(active, torch.exp2((logs - middle).round().clamp(-8, 8)), torch.ones_like(logs))


def _error(weights: Sequence[Tensor], scales_K: Tensor, power_K: Tensor, scheme: QuantScheme) -> float:
    total, power = 0.0, 0.0
    for weight in weights:
        scaled = weight.float() * scales_K
        grid = rtn_grid(scaled, scheme)
        power += float((weight.float().square() * power_K).sum(dtype=torch.float64))
        rounded = values_of(nearest_codes(scaled, grid, scheme), grid, scheme)
        total += float((((rounded - scaled) / scales_K).square() * power_K).sum(dtype=torch.float64))
    return total / power if math.isfinite(total) and power else math.inf
