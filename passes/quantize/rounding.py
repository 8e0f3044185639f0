"""One matrix to codes by the method asked for, never worse than rounding to nearest: tensors in, tensors out.

Rows are independent of each other, so each takes the best of what was tried. Shape letters as in `grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.quantized import QTensor
from ...spec.quant import QuantScheme
from .descent import descend
from .grid import Grid, nearest_codes, pack_grid, rtn_grid, values_of
from .propagation import Propagation
from .searched_grid import search_grid

# Weights worked on at a time: beside the matrix itself some ten float32 copies of so many are alive.
BAND_WEIGHTS = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Codes and scales learnt from the model's logits: at most how often all tokens are gone through, and how
    many million million multiply-adds that may take."""

    epochs: int
    work: float

    def affordable(self, num_parameters: int, num_tokens: int) -> int:
        """Epochs within that: each token costs four products with each weight."""
        return min(self.epochs, int(self.work * 1e12 / (4 * num_parameters * max(1, num_tokens))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How codes are found: on searched scales or those of rounding to nearest, with errors propagated or
    not, and with how many rounds of descent afterwards. All but the search need second moments. `catch_up`
    is the part of the drift of a layer's inputs that its weights make up for. `tuning` is what follows once
    all weights have codes."""

    search: bool = True
    propagate: bool = False
    rounds: int = 0
    catch_up: float = 0.0
    tuning: Tuning | None = None


class Rounded(NamedTuple):
    """A matrix as codes, and how much of the layer's output is lost: squared error over squared output,
    for it and for plain rounding to nearest. `num_nearest` rows are plainly rounded, since nothing tried
    was better for them."""

    tensor: QTensor
    error: float
    nearest_error: float
    num_nearest: int


def round_matrix(
    weight_NK: Tensor,
    scheme: QuantScheme,
    method: Method,
    gram_KK: Tensor | None = None,
    propagation: Propagation | None = None,
    target: Callable[[slice], Tensor] | None = None,
) -> Rounded:
    """`weight` in codes of `scheme`; `gram` are the second moments of its inputs, None when nothing is
    known of them. `propagation` is that of `gram`, needed where `method` asks for it. `target` gives rows of
    what the codes should come close to in place of `weight`, which is then what is plainly rounded to compare
    with.

    Errors are judged by `gram`; without it by the weights alone.
    """
    inputs = _Inputs(gram_KK, propagation)
    parts: list[_Part] = []
    for rows in _bands(weight_NK):
        weight = weight_NK[rows].float()
        wanted = weight if target is None else target(rows)
        parts.append(_round_rows(weight, wanted, scheme, method, inputs))
    zeros = [part.tensor.zeros for part in parts if part.tensor.zeros is not None]
    tensor = QTensor(
        torch.cat([part.tensor.codes for part in parts]),
        torch.cat([part.tensor.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )
    total = sum(part.power for part in parts) or 1.0
    return Rounded(
        tensor,
        sum(part.error for part in parts) / total,
        sum(part.nearest_error for part in parts) / total,
        sum(part.num_nearest for part in parts),
    )


class _Inputs(NamedTuple):
    """What is known of a layer's inputs."""

    gram: Tensor | None
    propagation: Propagation | None


class _Part(NamedTuple):
    """Some rows; errors and power are sums of squares."""

    tensor: QTensor
    error: float
    nearest_error: float
    power: float
    num_nearest: int


def _bands(weight_NK: Tensor) -> Iterator[slice]:
    size = max(1, BAND_WEIGHTS // weight_NK.shape[1])
    return (slice(start, start + size) for start in range(0, weight_NK.shape[0], size))


def _round_rows(
    weight_NK: Tensor, target_NK: Tensor, scheme: QuantScheme, method: Method, inputs: _Inputs
) -> _Part:
    nearest = rtn_grid(weight_NK, scheme)
    best_codes, best_grid = nearest_codes(weight_NK, nearest, scheme), nearest
    nearest_loss = best_loss = _loss(target_NK, best_codes, nearest, scheme, inputs.gram)
    is_nearest = torch.ones_like(best_loss, dtype=torch.bool)
    for codes, grid in _candidates(target_NK, scheme, method, inputs):
        loss = _loss(target_NK, codes, grid, scheme, inputs.gram)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_grid = _choose(better, grid, best_grid)
        is_nearest &= ~better
    power = _energy(target_NK, inputs.gram)
    return _Part(
        pack_grid(best_codes, best_grid, scheme),
        float(best_loss.sum()),
        float(nearest_loss.sum()),
        float(power.sum()),
        int((is_nearest & (nearest_loss > 0)).sum()),
    )


def _candidates(
    target_NK: Tensor, scheme: QuantScheme, method: Method, inputs: _Inputs
) -> Iterator[tuple[Tensor, Grid]]:
    grid = search_grid(target_NK, scheme, inputs.gram) if method.search else rtn_grid(target_NK, scheme)
    codes = nearest_codes(target_NK, grid, scheme)
    descends = bool(method.rounds) and inputs.gram is not None
    if not descends:
        yield codes, grid
    propagation = inputs.propagation
    if method.propagate and propagation is not None and propagation.damping is not None:
        codes = propagation.codes(target_NK, grid, scheme)
        if not descends:
            yield codes, grid
    if descends and inputs.gram is not None:
        # what it starts from is no better, so it need not be tried
        yield descend(target_NK, inputs.gram, codes, grid, scheme, method.rounds)


def _choose(better_N: Tensor, grid: Grid, other: Grid) -> Grid:
    scales = torch.where(better_N[:, None], grid.scales, other.scales)
    if grid.zeros is None or other.zeros is None:
        return Grid(scales, None)
    return Grid(scales, torch.where(better_N[:, None], grid.zeros, other.zeros))


def _loss(
    weight_NK: Tensor, codes: Tensor, grid: Grid, scheme: QuantScheme, gram_KK: Tensor | None
) -> Tensor:
    return _energy(weight_NK - values_of(codes, grid, scheme), gram_KK)


def _energy(values_NK: Tensor, gram_KK: Tensor | None) -> Tensor:
    """The squared output of each row, in float64."""
    weighed = values_NK if gram_KK is None else values_NK @ gram_KK
    return (weighed * values_NK).sum(1, dtype=torch.float64)
