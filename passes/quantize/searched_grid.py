"""Scales by search: for each group the grid that loses least, errors weighed by how the input varies.

The loss of a group is `e @ gram @ e` for its rounding error e, with `gram` the second moments of the group's
inputs: the part of the layer's output error that the group alone can answer for. Long groups use the
diagonal. The idea is that of importance matrices and scale estimation; candidates are then refitted by least
squares given their codes. Shape letters as in `grid`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.bands import map_bands
from ...spec.quant import QuantScheme
from .grid import Grid, code_range, rtn_grid, split_groups, storable

# Groups up to this long are judged by all their second moments, longer ones by the diagonal.
_FULL_GROUP = 128
_NUM_SIZES = 12
_REFITS = 3


def search_grid(weight_NK: Tensor, scheme: QuantScheme, gram_KK: Tensor | None) -> Grid:
    """The grid with the least loss for `weight` in float32, never a worse one than rounding to nearest has.

    `gram[K, K]` are the second moments of the inputs; None weighs all errors alike. Works in bands of
    rows.
    """
    moments = _moments(gram_KK, scheme, weight_NK.shape[1])
    bands = map_bands(lambda rows: _search(weight_NK[rows], scheme, moments), *weight_NK.shape)
    zeros = [band.zeros for band in bands if band.zeros is not None]
    return Grid(torch.cat([band.scales for band in bands]), torch.cat(zeros) if zeros else None)


def _sizes(bits: int) -> list[float]:
    """Sizes to try, as parts of the range of the weights. With few codes what is cut off pays for the rest;
    with many only where the grid happens to lie can be chosen."""
    first, step = (0.60, 0.05) if bits < 8 else (0.997, 0.003)
    return [first + step * index for index in range(_NUM_SIZES)]


class _Moments(NamedTuple):
    """Second moments by group: `full[G, S, S]`, or their `diagonal[G, 1, S]` alone."""

    full: Tensor | None
    diagonal: Tensor

    def times(self, values_GNS: Tensor) -> Tensor:
        return values_GNS * self.diagonal if self.full is None else values_GNS @ self.full

    def loss(self, errors_GNS: Tensor) -> Tensor:
        return (self.times(errors_GNS) * errors_GNS).sum(-1)


def _moments(gram_KK: Tensor | None, scheme: QuantScheme, width: int) -> _Moments:
    if gram_KK is None:
        return _Moments(None, torch.ones(1, 1, 1))
    diagonal = split_groups(gram_KK.diagonal()[None], scheme)[0]
    groups, size = diagonal.shape
    if size > _FULL_GROUP:
        return _Moments(None, diagonal[:, None])
    full = gram_KK.new_zeros(groups, size, size)
    for group in range(groups):
        columns = slice(group * size, min((group + 1) * size, width))
        count = columns.stop - columns.start
        full[group, :count, :count] = gram_KK[columns, columns]
    return _Moments(full, diagonal[:, None])


class _Best:
    """The best candidate of each group so far; tensors `[G, N, 1]`."""

    def __init__(self, weight_GNS: Tensor, scheme: QuantScheme, moments: _Moments, start: Grid) -> None:
        self._weight = weight_GNS
        self._scheme = scheme
        self._moments = moments
        self.scales = start.scales.T[..., None].contiguous()
        self.zeros = None if start.zeros is None else start.zeros.T[..., None].contiguous()
        self._loss = self._loss_of(self.scales, self.zeros)

    def codes(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Codes around zero of the group's weights on a grid."""
        low, high = code_range(self._scheme)
        codes = (self._weight / scales).round_()
        if zeros is None:
            return codes.clamp_(low, high)
        return torch.minimum(torch.maximum(codes, low - zeros), high - zeros)

    def _loss_of(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return self._moments.loss(self._weight - self.codes(scales, zeros) * scales)[..., None]

    def offer(self, scales: Tensor, zeros: Tensor | None) -> None:
        """Take the candidate where it loses less."""
        scales = storable(scales, self._scheme, self.scales)
        loss = self._loss_of(scales, zeros)
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.scales = torch.where(better, scales, self.scales)
        if zeros is not None and self.zeros is not None:
            self.zeros = torch.where(better, zeros, self.zeros)

    def refit(self) -> None:
        """Offer the scales that suit the codes best, by least squares."""
        codes = self.codes(self.scales, self.zeros)
        weighed = self._moments.times(codes)
        norm = (weighed * codes).sum(-1, keepdim=True)
        scales = (weighed * self._weight).sum(-1, keepdim=True) / norm
        self.offer(torch.where(norm > 0, scales, self.scales), self.zeros)


def _search(weight_NK: Tensor, scheme: QuantScheme, moments: _Moments) -> Grid:
    weight_NK = weight_NK.float()
    weight_GNS = split_groups(weight_NK, scheme).transpose(0, 1).contiguous()
    best = _Best(weight_GNS, scheme, moments, rtn_grid(weight_NK, scheme))
    candidates = _symmetric(weight_GNS, scheme) if scheme.symmetric else _asymmetric(weight_GNS, scheme)
    for scales, zeros in candidates:
        best.offer(scales, zeros)
    for _ in range(_REFITS):
        best.refit()
    return Grid(
        best.scales[..., 0].T.contiguous(), None if best.zeros is None else best.zeros[..., 0].T.contiguous()
    )


def _symmetric(weight_GNS: Tensor, scheme: QuantScheme) -> Iterator[tuple[Tensor, None]]:
    """The range has one more code on one side: the largest value lies there, or on the other side."""
    low, high = code_range(scheme)
    extreme = weight_GNS.gather(2, weight_GNS.abs().argmax(2, keepdim=True))
    for end in (low, high):
        for factor in _sizes(scheme.bits):
            yield extreme * (factor / end), None


def _asymmetric(weight_GNS: Tensor, scheme: QuantScheme) -> Iterator[tuple[Tensor, Tensor]]:
    _, high = code_range(scheme)
    smallest = weight_GNS.amin(2, keepdim=True).clamp(max=0)
    span = weight_GNS.amax(2, keepdim=True).clamp(min=0) - smallest
    for factor in _sizes(scheme.bits):
        scales = storable(span * (factor / high), scheme, torch.ones_like(span))
        exact = -smallest * factor / scales
        for zeros in (exact.floor(), exact.ceil()):
            yield scales, zeros.clamp(0, high)
