"""Packed matrices as lazy tensors, and what they were packed from: both directions of `kernels.packing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...artifact.cpu import PackedWeight
from ...ir.weights import Expr, Quantized, Reader
from ...kernels.packing import Codes, pack, pack_float, unpack, unpack_float
from ...spec.quant import QuantScheme, parse_scheme

Part = Literal["codes", "scales", "zeros"]
_PARTS: tuple[Part, ...] = ("codes", "scales", "zeros")
_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class PackedCodes:
    """Bytes of a quantised matrix in the layout of `kernels.packing`."""

    codes: Expr
    scales: Expr
    zeros: Expr | None
    scheme: QuantScheme
    width: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the codes."""
        zeros = None if self.zeros is None else self.zeros.evaluate(reader).numpy()
        parts = Codes(self.codes.evaluate(reader).numpy(), self.scales.evaluate(reader).numpy(), zeros)
        return torch.from_numpy(pack(parts, self.scheme, self.width))


@dataclass(frozen=True, slots=True)
class PackedFloat:
    """Bytes of a floating-point matrix in 32-row tiles."""

    of: Expr
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the matrix."""
        weight = self.of.evaluate(reader).contiguous()
        values = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        return torch.from_numpy(pack_float(values.numpy()))


@dataclass(frozen=True, slots=True)
class UnpackedCodes:
    """One part of the portable packing, from the packed bytes."""

    packed: Expr
    scheme: QuantScheme
    rows: int
    width: int
    part: Part
    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        """Unpack the matrix and keep the part."""
        codes = unpack(self.packed.evaluate(reader).numpy(), self.scheme, self.rows, self.width)
        return torch.from_numpy(np.ascontiguousarray(getattr(codes, self.part)))


@dataclass(frozen=True, slots=True)
class UnpackedFloat:
    """A floating-point matrix, from its tiles."""

    packed: Expr
    layout: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layout is named after."""
        return getattr(torch, self.layout)

    def evaluate(self, reader: Reader) -> Tensor:
        """Unpack the matrix."""
        rows, width = self.shape
        dtype: Any = np.dtype(_FLOATS[self.layout])
        values = unpack_float(self.packed.evaluate(reader).numpy(), dtype, (rows, width))
        return torch.from_numpy(np.ascontiguousarray(values)).view(self.dtype)


def unpacked(weight: PackedWeight, stored: Expr) -> dict[str, Expr]:
    """The program's weights that a stored packed one holds, by name."""
    if weight.layout in _FLOATS:
        return {weight.names[0]: UnpackedFloat(stored, weight.layout, (weight.rows, weight.width))}
    scheme = parse_scheme(weight.layout)
    shape_only = _ShapeOnly((weight.rows, weight.width), torch.float32)
    parts: dict[str, Expr] = {}
    for name, part in zip(weight.names, _PARTS, strict=False):
        like = Quantized(shape_only, scheme, part)
        parts[name] = UnpackedCodes(stored, scheme, weight.rows, weight.width, part, like.shape, like.dtype)
    return parts


@dataclass(frozen=True, slots=True)
class _ShapeOnly:
    """Stands for a matrix whose values nobody asks for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def evaluate(self, reader: Reader) -> Tensor:
        raise NotImplementedError
