"""How weights reach generated code: as plain arrays for generic operators, as matrices for canonical ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...spec.errors import TargetError
from ...spec.quant import QuantScheme

_NATIVE = {torch.float32: "float", torch.bfloat16: "llmc::bf16", torch.float16: "llmc::f16"}


@dataclass(slots=True)
class WeightSlots:
    """The order in which the step finds its weights: (name, form), each once.

    Form `plain` is float32, int64 or one byte a bool; form `stored` is the tensor as the program has it.
    """

    slots: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def pointer(self, name: str, form: str) -> str:
        """C++ for the address of a weight in a form."""
        index = self.slots.setdefault((name, form), len(self.slots))
        return f"s.weights[{index}]"


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """An unquantised matrix `[rows, width]` (leading dimensions flattened) in its own dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def argument(self, slots: WeightSlots) -> str:
        """C++ for the matrix."""
        if self.dtype not in _NATIVE:
            raise TargetError(
                "cpu.weight_dtype",
                f"Weight {self.name!r} is stored as {self.dtype}.",
                "The CPU target multiplies float32, bfloat16, float16 and quantised matrices.",
                "Compile with --dtype float32 or bfloat16.",
            )
        ctype = _NATIVE[self.dtype]
        address = f"(const {ctype}*){slots.pointer(self.name, 'stored')}"
        return f"llmc::plain::Rows<{ctype}>{{{address}, {self.shape[-1]}}}"


@dataclass(frozen=True, slots=True)
class CodeMatrix:
    """A quantised matrix `[rows, width]` in the portable packing."""

    codes: str
    scales: str
    zeros: str | None
    width: int
    stored_bytes: int
    scheme: QuantScheme

    def argument(self, slots: WeightSlots) -> str:
        """C++ for the matrix."""
        groups = self.scheme.num_groups(self.width)
        size = self.scheme.group_size or self.scheme.padded_in_features(self.width)
        zeros = "nullptr" if self.zeros is None else f"(const uint8_t*){slots.pointer(self.zeros, 'stored')}"
        return (
            f"llmc::plain::Codes{{(const uint8_t*){slots.pointer(self.codes, 'stored')}, "
            f"(const llmc::f16*){slots.pointer(self.scales, 'stored')}, {zeros}, "
            f"{self.stored_bytes}, {groups}, {size}, {self.scheme.bits}}}"
        )


Matrix = StoredMatrix | CodeMatrix
