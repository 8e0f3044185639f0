"""A weight whose rows or columns are turned by a fixed orthogonal matrix, lazily."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .bands import map_bands
from .weights import Expr, Reader, SameForm


@dataclass(frozen=True, slots=True)
class Rotated(SameForm):
    """`of` with each run of `size` elements from `start` up to `stop` along dimension `dim` turned: `x @ R`,
    with R of `rotate_rows` for `seed`. Where there is a gain, they are multiplied by `gain + offset` before.
    In the dtype of `of`."""

    dim: int
    size: int
    seed: int
    start: int
    stop: int
    gain: Expr | None = None
    offset: float = 0.0

    def evaluate(self, reader: Reader) -> Tensor:
        """Turn in float32 and round once."""
        turned = self.of.evaluate(reader).movedim(self.dim, -1).clone(memory_format=torch.contiguous_format)
        gain = None if self.gain is None else self.gain.evaluate(reader).float() + self.offset
        rows = turned.view(-1, turned.shape[-1])[:, self.start : self.stop]

        def turn(band: slice) -> None:
            values = rows[band].float() if gain is None else rows[band].float() * gain
            rows[band] = (
                rotate_rows(values.unflatten(-1, (-1, self.size)), self.seed).flatten(-2).to(self.dtype)
            )

        map_bands(turn, rows.shape[0], rows.shape[1])
        return turned.movedim(-1, self.dim).contiguous()


def rotate_rows(values: Tensor, seed: int) -> Tensor:
    """`values[..., n] @ R` in float32, for an orthogonal R that spreads each element over all others.

    R is a diagonal of random signs, then the Kronecker product of a Hadamard matrix, of the largest power of
    two that divides n, and a cosine transform (DCT-II) of the rest.
    """
    width = values.shape[-1]
    power = width & -width
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    turned = (values.float() * signs).unflatten(-1, (power, width // power)) @ _cosines(width // power)
    step = 1
    while step < power:
        pairs = turned.unflatten(-2, (-1, 2, step))
        first, second = pairs.select(-3, 0), pairs.select(-3, 1)
        turned = torch.stack((first + second, first - second), -3).flatten(-4, -2)
        step *= 2
    return (turned / math.sqrt(power)).flatten(-2)


def _cosines(size: int) -> Tensor:
    """The orthogonal matrix of DCT-II, `[size, size]`."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (steps[:, None] + 0.5) * steps) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix.float()
