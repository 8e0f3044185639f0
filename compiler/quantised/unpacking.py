"""Codes packed into 32-bit words, and the portable packing made of them, as lazy tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ...ir.quantized import pack_codes, part_dtype, part_shape
from ...ir.weights import Expr, Reader
from ...spec.quant import QuantScheme

_WORD = 32


@dataclass(frozen=True, slots=True)
class Unpacked:
    """`count` unsigned codes of `bits` bits in each line of 32-bit words `of`, along `dim`.

    Code i lies at bits `i * bits` on, from the lowest bit of the first word, across words where they do not
    divide; `order[i]` is the place, within each word's codes, of the code that lies i-th in it. The result is
    uint8 with the codes of a line along the last dimension: `[lines, count]`.
    """

    of: Expr
    bits: int
    dim: int
    count: int
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Lines first, whichever dimension they were."""
        return (self.of.shape[1 - self.dim], self.count)

    @property
    def dtype(self) -> torch.dtype:
        """Codes have at most 8 bits."""
        return torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Take the words apart, a code position at a time."""
        words = self.of.evaluate(reader)
        lines = (words.T if self.dim == 0 else words).to(torch.int64) & 0xFFFFFFFF
        return unpack_words(lines, self.bits, self.count, self.order)


def unpack_words(words: Tensor, bits: int, count: int, order: tuple[int, ...] = ()) -> Tensor:
    """`count` codes a line of int64 `words [lines, n]`, each below 2**32; uint8 `[lines, count]`."""
    step = gcd(bits, _WORD)
    per_period, words_per_period = _WORD // step, bits // step
    missing = -words.shape[1] % words_per_period
    periods = torch.nn.functional.pad(words, (0, missing)).unflatten(1, (-1, words_per_period))
    out = torch.empty((*periods.shape[:2], per_period), dtype=torch.uint8)
    for index in range(per_period):
        word, shift = divmod(index * bits, _WORD)
        code = periods[:, :, word] >> shift
        if shift + bits > _WORD:
            code = code | (periods[:, :, word + 1] << (_WORD - shift))
        out[:, :, order[index] if order else index] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return out.flatten(1)[:, :count]


def words_for(count: int, bits: int) -> int:
    """Words of one line of `count` codes."""
    return -(-count * bits // _WORD)


@dataclass(frozen=True, slots=True)
class Portable:
    """Codes `of [N, K]` in the portable packing of `scheme`; `offset` is subtracted from each, and stored
    column j is column `order[j]` of `of` where there is an order."""

    of: Expr
    scheme: QuantScheme
    offset: int = 0
    order: Expr | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As packed."""
        return part_shape(self.of.shape, self.scheme, "codes")

    @property
    def dtype(self) -> torch.dtype:
        """As packed."""
        return part_dtype(self.scheme, "codes")

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the codes; none changes its meaning."""
        codes = self.of.evaluate(reader)
        if self.order is not None:
            codes = codes[:, self.order.evaluate(reader)]
        return pack_codes(codes.to(torch.int16) - self.offset, self.scheme)


@dataclass(frozen=True, slots=True)
class Shifted:
    """Small integers `of` as uint8 with `added` added: zero points, as codes count them."""

    of: Expr
    added: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As `of`."""
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        """Zero points are bytes."""
        return torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Add."""
        return (self.of.evaluate(reader).to(torch.int16) + self.added).to(torch.uint8)
