"""Second moments of a layer's inputs, gathered batch by batch. Knows tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the diagonal, as a part of its mean, for as many rows as columns; half as much for twice as many.
# Moments of few tokens tell little of what varies together, and codes would be fitted to chance.
_SHRINKAGE = 0.5
# Columns of one strip: products below the diagonal are not computed but mirrored.
_STRIP = 1024


class Drift:
    """How the inputs of a layer have moved since its weights were trained: the running sum of `d.T @ x` for
    what rows `x[T, K]` are now and the difference `d` to what they were, in float32.

    Given stacked weights `[N, K]` with N below K, it keeps the smaller `weights @ d.T @ x` instead.
    """

    def __init__(self, width: int, weights_NK: Tensor | None) -> None:
        self._weights = weights_NK if weights_NK is not None and weights_NK.shape[0] < width else None
        self._sum = torch.zeros(width if self._weights is None else self._weights.shape[0], width)
        self._num_rows = 0

    def observe(self, rows_TK: Tensor, before_TK: Tensor) -> None:
        """Add some rows as they are and as they were."""
        moved = before_TK.float() - rows_TK.float()
        left = moved if self._weights is None else moved @ self._weights.T
        self._sum.addmm_(left.T, rows_TK.float())
        self._num_rows += rows_TK.shape[0]

    def mean(self) -> Tensor:
        """The mean of `d.T @ x` `[K, K]`, of `weights @ d.T @ x` where weights were given."""
        return self._sum / max(1, self._num_rows)

    def pull(self, weights_NK: Tensor) -> Tensor:
        """The mean of `weights @ d.T @ x` `[N, K]` for the weights given at first, or any where none were."""
        return self.mean() if self._weights is not None else weights_NK.float() @ self.mean()


class SecondMoments:
    """The running sum of `x.T @ x` over rows `x[T, K]`, in float32."""

    def __init__(self, width: int) -> None:
        self.num_rows = 0
        self._sum_KK = torch.zeros(width, width)

    def observe(self, rows_TK: Tensor) -> None:
        """Add some rows."""
        rows_TK = rows_TK.float()
        self.num_rows += rows_TK.shape[0]
        width = rows_TK.shape[1]
        for start in range(0, width, _STRIP):
            stop = min(start + _STRIP, width)
            self._sum_KK[start:stop, start:].addmm_(rows_TK[:, start:stop].T, rows_TK[:, start:])

    def gram(self) -> Tensor:
        """The mean of `x.T @ x` over all rows `[K, K]`, shrunk towards a diagonal where rows are few; inputs
        that were never active stay zero. Gives the memory away, so it can be asked once."""
        gram = self._sum_KK.div_(max(1, self.num_rows))
        width = gram.shape[0]
        for start in range(0, width, _STRIP):
            stop = min(start + _STRIP, width)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        del self._sum_KK
        diagonal = gram.diagonal()
        shrinkage = _SHRINKAGE * width / max(1, self.num_rows)
        diagonal[diagonal > 0] += shrinkage * float(diagonal.mean())
        return gram
