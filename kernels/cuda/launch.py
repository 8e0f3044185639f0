"""What it takes to launch a kernel, as data: which kernel in which specialisation, over which grid, on which
values.

Knows neither triton nor a driver; a `Launcher` does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Constant = int | bool | str

_TYPES = {
    "torch.float64": "*fp64",
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float8_e4m3fn": "*fp8e4nv",
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.int8": "*i8",
    "torch.uint8": "*u8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """One compiled form of a kernel.

    `kernel` is `module.function` in this package. `types` are those of its run-time parameters in their
    order, in triton's spelling; a pointer that the form never reads has type `none`. `constants` are the
    others. Pointers are multiples of 16 bytes.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """A name for it: the same for equal specialisations, on every machine."""
        fields = [self.kernel, self.types, self.constants, self.warps, self.stages]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:24]

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        """Name and type of each value that a launch passes, in order."""
        return tuple((name, kind) for name, kind in self.types if kind != "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch: values by parameter name, pointers as tensors."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    values: Mapping[str, Any]


class Launcher(Protocol):
    """Carries out launches in order."""

    def __call__(self, launch: Launch) -> None:
        """Runs it, or raises LlmcError when it cannot."""
        ...


def launch_of(
    kernel: str,
    grid: tuple[int, ...],
    values: Mapping[str, Any],
    constants: Mapping[str, Constant],
    *,
    warps: int = 4,
    stages: int = 3,
) -> Launch:
    """A launch of `kernel` over `grid`, its specialisation derived from the values: tensors (or None, where
    the constants say that it is not read), ints (`i32`) and floats (`fp32`)."""
    specialisation = Specialisation(
        kernel=kernel,
        types=tuple((name, _type_of(value)) for name, value in values.items()),
        constants=tuple(constants.items()),
        warps=warps,
        stages=stages,
    )
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(specialisation=specialisation, grid=(x, y, z), values=values)


def _type_of(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool | int):
        return "i32"
    if isinstance(value, float):
        return "fp32"
    return _TYPES[str(value.dtype)]


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number` (at least 1)."""
    return 1 << max(0, number - 1).bit_length()


def blocks(total: int, block: int) -> int:
    """How many blocks of `block` cover `total`."""
    return -(-total // block)


def row_stride(rows: Any) -> int:
    """Elements from one row of a tensor to the next. Of a single row torch says different numbers for the
    same view of a tensor with data and of one without; it is as wide as a row here."""
    return rows.stride(0) if rows.shape[0] != 1 else math.prod(rows.shape[1:])
