"""Codes by error propagation (GPTQ, Frantar et al. 2022): each column's rounding error is made up for by the
columns not rounded yet.

Columns go in descending order of their second moment, while groups stay where they are (static act-order).
Shape letters as in `grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.finite import all_finite
from ...spec.quant import QuantScheme
from .grid import Grid, by_column, code_range

# Columns whose errors reach all later ones at once, and those within that reach each other column by column.
_BLOCK, _INNER = 128, 16
# Added to the diagonal, as parts of its mean; the next is tried where a factorisation fails.
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)


class Propagation:
    """Error propagation over inputs with second moments `gram[K, K]`, factored once for any number of rows.

    `damping` is the part of the mean diagonal that it took to make `gram` invertible, None when none was
    enough. A column that was never active (its second moment is zero) touches no other and is rounded to
    nearest.
    """

    def __init__(self, gram_KK: Tensor) -> None:
        self._order = torch.argsort(gram_KK.diagonal(), descending=True, stable=True)
        self.num_dead = int((gram_KK.diagonal() == 0).sum())
        self._upper, self.damping = _factor(gram_KK[self._order][:, self._order])

    def solve(self, right_NK: Tensor) -> Tensor:
        """`right @ inverse(gram)`, gram damped as for propagation; needs a `damping`."""
        solved = torch.empty_like(right_NK)
        solved[:, self._order] = right_NK[:, self._order] @ self._upper.T @ self._upper
        return solved

    def codes(self, weight_NK: Tensor, grid: Grid, scheme: QuantScheme) -> Tensor:
        """Codes of `weight` on `grid`, whole numbers in float32 `[N, K]`; needs a `damping`."""
        order, width = self._order, weight_NK.shape[1]
        scales = by_column(grid.scales, scheme, width)[:, order].T.contiguous()
        zeros = (
            by_column(grid.zeros, scheme, width)[:, order].T.contiguous() if grid.zeros is not None else None
        )
        weight_KN = weight_NK[:, order].T.contiguous()
        codes = torch.empty_like(weight_NK)
        codes[:, order] = _round_columns(weight_KN, self._upper, scales, zeros, code_range(scheme)).T
        return codes


def _factor(gram: Tensor) -> tuple[Tensor, float | None]:
    """The upper Cholesky factor of the inverse of `gram`, damped as little as it takes; `gram` is used up."""
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    mean = float(diagonal.mean())
    for damping, previous in zip(DAMPING, (0.0, *DAMPING), strict=False):
        diagonal += (damping - previous) * mean
        lower, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed):
            continue
        # in the same memory: of wide inputs each of these takes half a gigabyte
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower, out=lower), upper=True)
        del lower
        # factors lie column by column, and of anything else extremes are found in a copy
        if not bool(failed) and all_finite(upper.T):
            return upper, damping
    return gram, None


def _round_columns(
    weight_KN: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor | None, limits: tuple[int, int]
) -> Tensor:
    """Codes `[K, N]`; `weight` is used up. Errors reach the columns of later blocks once a block, large or
    small."""
    codes_KN = torch.empty_like(weight_KN)
    for start in range(0, weight_KN.shape[0], _BLOCK):
        stop = min(start + _BLOCK, weight_KN.shape[0])
        errors = torch.empty_like(weight_KN[start:stop])
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            for column in range(first, last):
                codes = weight_KN[column] / scales[column]
                if zeros is not None:
                    codes += zeros[column]
                codes.round_().clamp_(*limits)
                codes_KN[column] = codes
                values = (codes if zeros is None else codes - zeros[column]) * scales[column]
                error = (weight_KN[column] - values) / upper[column, column]
                errors[column - start] = error
                weight_KN[column + 1 : last].addr_(upper[column, column + 1 : last], error, alpha=-1)
            own = errors[first - start : last - start]
            weight_KN[last:stop].addmm_(upper[first:last, last:stop].T, own, alpha=-1)
        weight_KN[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes_KN
