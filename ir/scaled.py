"""A weight with factors folded into one of its dimensions, lazily."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .weights import Expr, Reader, SameForm


@dataclass(frozen=True, slots=True)
class Scaled(SameForm):
    """`(of + offset) * factors - offset`, the float32 `factors` along dimension `dim`; in the dtype of `of`.

    `offset` is that of a norm, which multiplies with its weight plus one number.
    """

    factors: Expr
    dim: int
    offset: float = 0.0

    def evaluate(self, reader: Reader) -> Tensor:
        """Multiply in float32 and round once."""
        along = [1] * len(self.shape)
        along[self.dim] = -1
        factors = self.factors.evaluate(reader).reshape(along)
        values = self.of.evaluate(reader).float()
        return ((values + self.offset) * factors - self.offset).to(self.dtype)
