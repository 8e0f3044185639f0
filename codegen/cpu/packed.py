"""Packed matrices as lazy tensors, and what they were packed from: both directions of `kernels.packing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...artifact.cpu import PackedWeight
from ...ir.quantized import part_dtype, part_shape
from ...ir.weights import Expr, Reader
from ...kernels.packing import Codes, has_layout, pack, pack_float, unpack, unpack_float
from ...kernels.tables import TableCodes, pack_table, unpack_table
from ...spec.quant import QuantScheme, parse_scheme

Part = Literal["codes", "scales", "zeros"]
_PARTS: tuple[Part, ...] = ("codes", "scales", "zeros")
_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Bytes of a quantised matrix `[N, K]`, or of stacked ones `[E, N, K]` one after the other, in the layout
    of `kernels.packing` or, for schemes that it has none for, of `kernels.tables`."""

    codes: Expr
    scales: Expr
    zeros: Expr | None
    scheme: QuantScheme
    width: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the codes."""
        codes, scales = self.codes.evaluate(reader), self.scales.evaluate(reader)
        zeros = None if self.zeros is None else self.zeros.evaluate(reader)
        if codes.dim() == 2:
            return torch.from_numpy(self._packed(codes, scales, zeros))
        one = self.shape[0] // codes.shape[0]
        out = torch.empty(self.shape, dtype=torch.uint8)
        for expert in range(codes.shape[0]):
            own_zeros = None if zeros is None else zeros[expert]
            packed = self._packed(codes[expert], scales[expert], own_zeros)
            out[expert * one : (expert + 1) * one] = torch.from_numpy(packed)
        return out

    def _packed(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> NDArray[np.uint8]:
        added = None if zeros is None else zeros.numpy()
        if has_layout(self.scheme):
            return pack(Codes(codes.numpy(), scales.numpy(), added), self.scheme, self.width)
        parts = TableCodes(codes.view(torch.uint8).numpy(), scales.float().numpy(), added)
        return pack_table(parts, self.scheme, codes.shape[0], self.width)


@dataclass(frozen=True, slots=True)
class PackedFloat:
    """Bytes of a floating-point matrix, or of stacked ones, in 32-row tiles."""

    of: Expr
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the matrix."""
        weight = self.of.evaluate(reader).contiguous()
        values = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        if values.dim() == 2:
            return torch.from_numpy(pack_float(values.numpy()))
        return torch.cat([torch.from_numpy(pack_float(one.numpy())) for one in values])


@dataclass(frozen=True, slots=True)
class UnpackedCodes:
    """One part of the portable packing, from the packed bytes."""

    packed: Expr
    weight: PackedWeight
    part: Part
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Unpack the matrices and keep the part."""
        packed = self.packed.evaluate(reader).numpy()
        pieces = [self._part(one) for one in np.split(packed, self.weight.experts or 1)]
        out = pieces[0] if self.weight.experts == 0 else torch.stack(pieces)
        return out.view(self.dtype) if self.part == "codes" else out.to(self.dtype)

    def _part(self, packed: NDArray[np.uint8]) -> Tensor:
        scheme, rows, width = parse_scheme(self.weight.layout), self.weight.rows, self.weight.width
        whole: Codes | TableCodes
        if has_layout(scheme):
            whole = unpack(packed, scheme, rows, width)
        else:
            whole = unpack_table(packed, scheme, rows, width)
        return torch.from_numpy(np.ascontiguousarray(getattr(whole, self.part)))


@dataclass(frozen=True, slots=True)
class UnpackedFloat:
    """A floating-point matrix or stack, from its tiles."""

    packed: Expr
    layout: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layout is named after."""
        return getattr(torch, self.layout)

    def evaluate(self, reader: Reader) -> Tensor:
        """Unpack the matrix."""
        *stack, rows, width = self.shape
        dtype: Any = np.dtype(_FLOATS[self.layout])
        packed = self.packed.evaluate(reader).numpy()
        pieces = [unpack_float(one, dtype, (rows, width)) for one in np.split(packed, *(stack or [1]))]
        values = np.stack(pieces) if stack else pieces[0]
        return torch.from_numpy(np.ascontiguousarray(values)).view(self.dtype)


def unpacked(weight: PackedWeight, stored: Expr) -> dict[str, Expr]:
    """The program's weights that a stored packed one holds, by name."""
    stack = (weight.experts,) if weight.experts else ()
    shape = (*stack, weight.rows, weight.width)
    if weight.layout in _FLOATS:
        return {weight.names[0]: UnpackedFloat(stored, weight.layout, shape)}
    scheme = parse_scheme(weight.layout)
    parts: dict[str, Expr] = {}
    for name, part in zip(weight.names, _PARTS, strict=False):
        sizes, dtype = part_shape(shape, scheme, part), part_dtype(scheme, part)
        parts[name] = UnpackedCodes(stored, weight, part, sizes, dtype)
    return parts
