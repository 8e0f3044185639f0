"""Weights that are codes already: values for whoever reads them plainly, codes for a pass that keeps them.

Knows how codes are cut and joined with the matrices that they stand for; knows no checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..spec.quant import QuantScheme
from .quantized import dequantize_rows
from .weights import Cast, Concat, Expr, Permute, Reader, SameForm, Slice, Stack


@dataclass(frozen=True, slots=True)
class Codes(SameForm):
    """A stored part of a quantised weight in the portable packing, which stands for `num_parameters`
    weights."""

    num_parameters: int

    def evaluate(self, reader: Reader) -> Tensor:
        """The part."""
        return self.of.evaluate(reader)


@dataclass(frozen=True, slots=True, eq=False)
class Dequantized:
    """The values `[..., N, width]` of codes of `scheme`, in `dtype`.

    `codes`, `scales` and `zeros` are as `ir.quantized` packs them. `order[j]` is the input that the j-th
    stored column belongs to, None where they lie in order. `activation` is how the checkpoint rounds the
    inputs of this weight's product, with `activation_scale` where that is static.
    """

    codes: Expr
    scales: Expr
    zeros: Expr | None
    scheme: QuantScheme
    width: int
    dtype: torch.dtype
    order: Expr | None = None
    activation: str = ""
    activation_scale: Expr | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return (*self.codes.shape[:-1], self.width)

    def evaluate(self, reader: Reader) -> Tensor:
        """Dequantise, matrix by matrix."""
        codes, scales = self.codes.evaluate(reader), self.scales.evaluate(reader)
        zeros = None if self.zeros is None else self.zeros.evaluate(reader)
        out = torch.empty(self.shape, dtype=self.dtype)
        lead = math.prod(self.shape[:-2])
        targets = out.reshape(lead, *self.shape[-2:])
        for index, target in enumerate(targets):
            parts = [None if part is None else part.reshape(lead, *part.shape[-2:])[index]
                     for part in (codes, scales, zeros)]  # fmt: skip
            assert parts[0] is not None
            assert parts[1] is not None
            values = dequantize_rows(parts[0], parts[1], parts[2], self.scheme, self.width, self.dtype)
            if self.order is None:
                target.copy_(values)
            else:
                target[:, self.order.evaluate(reader).long()] = values
        return out

    def same_kind(self, other: Dequantized) -> bool:
        """Whether both may be rows of one matrix of codes whose product rounds its input once."""
        ours = (self.scheme, self.width, self.activation, len(self.shape))
        theirs = (other.scheme, other.width, other.activation, len(other.shape))
        shared = self.order is other.order and self.activation_scale is other.activation_scale
        return ours == theirs and shared

    @property
    def by_row(self) -> Dequantized:
        """The same with scales of its own for every row, where blocks of rows share them."""
        scheme, rows = self.scheme, self.codes.shape[-2]
        if not scheme.block_rows:
            return self
        parts = [None if part is None else RepeatedRows(part, scheme.block_rows, rows)
                 for part in (self.scales, self.zeros)]  # fmt: skip
        assert parts[0] is not None
        return replace(self, scales=parts[0], zeros=parts[1], scheme=replace(scheme, block_rows=0))


@dataclass(frozen=True, slots=True)
class RepeatedRows:
    """Each row of `of[..., B, G]` `times` times, cut to `rows`."""

    of: Expr
    times: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """With more rows."""
        return (*self.of.shape[:-2], self.rows, self.of.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """As `of`."""
        return self.of.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Repeat the rows."""
        return self.of.evaluate(reader).repeat_interleave(self.times, -2)[..., : self.rows, :]


def coded_form(expr: Expr) -> Dequantized | None:
    """The codes behind `expr`: of a stored weight, or of rows cut from, joined or stacked of such; None where
    there are none, or where no codes give its values without rounding again."""
    match expr:
        case Dequantized():
            return expr
        case Cast():
            return coded_form(expr.of)
        case Permute(of=Permute(of=inner, dims=first), dims=second) if _undoes(first, second):
            return coded_form(inner)
        case Slice() if expr.dim == len(expr.shape) - 2:
            form = coded_form(expr.of)
            return None if form is None else _cut(form, expr.start, expr.stop)
        case Concat() if expr.dim == len(expr.shape) - 2:
            return _together(expr.parts, lambda parts: Concat(tuple(parts), expr.dim))
        case Stack() if len(expr.shape) == 3:
            return _together(expr.parts, lambda parts: Stack(tuple(parts)))
        case _:
            return None


def is_coded(expr: Expr) -> bool:
    """Whether any of the values of `expr` come from codes."""
    if isinstance(expr, Dequantized):
        return True
    inner = getattr(expr, "of", None)
    parts: Sequence[Expr] = getattr(expr, "parts", ())
    return (inner is not None and is_coded(inner)) or any(map(is_coded, parts))


def _undoes(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    return tuple(first[dim] for dim in second) == tuple(range(len(first)))


def _cut(form: Dequantized, start: int, stop: int) -> Dequantized:
    height = form.scheme.block_rows
    if height and (start % height or (stop % height and stop != form.codes.shape[-2])):
        return _cut(form.by_row, start, stop)
    dim = len(form.shape) - 2
    first, last = (start // height, -(-stop // height)) if height else (start, stop)
    zeros = None if form.zeros is None else Slice(form.zeros, dim, first, last)
    scales = Slice(form.scales, dim, first, last)
    return replace(form, codes=Slice(form.codes, dim, start, stop), scales=scales, zeros=zeros)


def _together(parts: tuple[Expr, ...], join: Callable[[list[Expr]], Expr]) -> Dequantized | None:
    forms = [coded_form(part) for part in parts]
    found = [form for form in forms if form is not None]
    if len(found) < len(forms):
        return None
    height = found[0].scheme.block_rows
    if height and any(form.codes.shape[-2] % height for form in found[:-1]):
        found = [form.by_row for form in found]
    first = found[0]
    if not all(first.same_kind(form) for form in found[1:]):
        return None
    zeros = [form.zeros for form in found if form.zeros is not None]
    return replace(
        first,
        codes=join([form.codes for form in found]),
        scales=join([form.scales for form in found]),
        zeros=join(zeros) if zeros else None,
    )
