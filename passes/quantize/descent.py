"""Codes and scales made better in turns, one column or group at a time, with all others held.

Each step solves its own small problem exactly, so the layer's output error never grows: coordinate descent
over codes (as in QuantEase, Behdin et al. 2023) and least squares over scales. Shape letters as in `grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec.quant import QuantScheme
from .grid import Grid, by_column, code_range, storable, values_of

# Columns whose moves reach all others at once, and those within that reach each other column by column.
_BLOCK, _INNER = 128, 16


def descend(
    weight_NK: Tensor, gram_KK: Tensor, codes_NK: Tensor, grid: Grid, scheme: QuantScheme, rounds: int
) -> tuple[Tensor, Grid]:
    """Codes and grid after `rounds` sweeps over scales, then codes. Zero points stay.

    `gram` must be positive semidefinite; columns that were never active keep their codes.
    """
    codes_NK = codes_NK.clone()
    # the error times `gram`, kept up to date by every step: what a column would have to move by, times its
    # second moment, to be best given all others
    pull_NK = (weight_NK - values_of(codes_NK, grid, scheme)) @ gram_KK
    for _ in range(rounds):
        grid = _refit_scales(pull_NK, gram_KK, codes_NK, grid, scheme)
        pull_NK = _sweep_codes(pull_NK, gram_KK, codes_NK, grid, scheme)
    return codes_NK, grid


def _refit_scales(
    pull_NK: Tensor, gram_KK: Tensor, codes_NK: Tensor, grid: Grid, scheme: QuantScheme
) -> Grid:
    """The scales that suit the codes best, group after group; `pull` changes in place."""
    width = pull_NK.shape[1]
    size = scheme.group_size or width
    scales = grid.scales.clone()
    for group in range(scales.shape[1]):
        columns = slice(group * size, min((group + 1) * size, width))
        codes = codes_NK[:, columns]
        if grid.zeros is not None:
            codes = codes - grid.zeros[:, group, None]
        norm = ((codes @ gram_KK[columns, columns]) * codes).sum(1)
        gain = (pull_NK[:, columns] * codes).sum(1)
        old = scales[:, group]
        new = storable(torch.where(norm > 0, old + gain / norm, old), scheme, old)
        pull_NK.addmm_((new - old)[:, None] * codes, gram_KK[columns], alpha=-1)
        scales[:, group] = new
    return Grid(scales, grid.zeros)


def _sweep_codes(
    pull_NK: Tensor, gram_KK: Tensor, codes_NK: Tensor, grid: Grid, scheme: QuantScheme
) -> Tensor:
    """One sweep over the columns, codes in place; the pull that is left."""
    width = pull_NK.shape[1]
    low, high = code_range(scheme)
    pull_KN = pull_NK.T.contiguous()
    scales_KN = by_column(grid.scales, scheme, width).T.contiguous()
    codes_KN = codes_NK.T.contiguous()
    moments = gram_KK.diagonal()
    for start, stop in _spans(0, width, _BLOCK):
        moved = torch.zeros_like(pull_KN[start:stop])
        for first, last in _spans(start, stop, _INNER):
            pull = pull_KN[first:last]
            own = moved[first - start : last - start]
            for column in range(first, last):
                moment = float(moments[column])
                if moment <= 0:
                    continue
                old = codes_KN[column]
                new = (old + pull[column - first] / (moment * scales_KN[column])).round_().clamp_(low, high)
                change = (new - old) * scales_KN[column]
                codes_KN[column] = new
                own[column - first] = change
                pull.addr_(gram_KK[first:last, column], change, alpha=-1)
            pull_KN[start:first].addmm_(gram_KK[start:first, first:last], own, alpha=-1)
            pull_KN[last:stop].addmm_(gram_KK[last:stop, first:last], own, alpha=-1)
        pull_KN[:start].addmm_(gram_KK[:start, start:stop], moved, alpha=-1)
        pull_KN[stop:].addmm_(gram_KK[stop:, start:stop], moved, alpha=-1)
    codes_NK.copy_(codes_KN.T)
    return pull_KN.T.contiguous()


def _spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]
