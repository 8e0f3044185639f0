"""How weights reach generated code: which stored tensor each slot of the step is, and in what form.

Matrices of tuned kernels are packed in their layout; the rest is plain, or as the program has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...artifact.cpu import PackedWeight
from ...ir.weights import Cast, Expr, WeightStore
from ...kernels.catalog import FLOAT_TYPES, IntegerLinear, float_linear, integer_linear
from ...spec.errors import TargetError
from ...spec.quant import QuantScheme
from .packed import PackedCodes, PackedFloat


class Slot(Protocol):
    """One weight as a step reads it."""

    @property
    def stored_name(self) -> str:
        """The tensor of the artifact."""
        ...

    def expression(self, store: WeightStore) -> Expr:
        """Its values, from the weights of the program."""
        ...

    @property
    def packed(self) -> PackedWeight | None:
        """How to get the program's weights back from it, where it replaces them."""
        ...


@dataclass(slots=True)
class WeightSlots:
    """The order in which the step finds its weights, each once."""

    slots: dict[str, Slot] = field(default_factory=dict[str, Slot])
    order: dict[str, int] = field(default_factory=dict[str, int])

    def pointer(self, slot: Slot) -> str:
        """C++ for the address of a weight."""
        name = slot.stored_name
        if name not in self.slots:
            self.order[name] = len(self.slots)
            self.slots[name] = slot
        return f"s.weights[{self.order[name]}]"


@dataclass(frozen=True, slots=True)
class PlainSlot:
    """A small weight as generic loops read it: float32, int64 or one byte a bool."""

    name: str
    packed: None = None

    @property
    def stored_name(self) -> str:
        """Beside the program's own tensor."""
        return f"{self.name}@plain"

    def expression(self, store: WeightStore) -> Expr:
        """The values, cast."""
        expr = store[self.name]
        if expr.dtype.is_floating_point:
            return Cast(expr, torch.float32)
        return expr if expr.dtype == torch.bool else Cast(expr, torch.int64)


@dataclass(frozen=True, slots=True)
class StoredSlot:
    """A tensor as the program has it."""

    name: str
    packed: None = None

    @property
    def stored_name(self) -> str:
        """The same tensor."""
        return self.name

    def expression(self, store: WeightStore) -> Expr:
        """The same values."""
        return store[self.name]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """An unquantised matrix `[rows, width]` in 32-row tiles of its own dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def element(self) -> str:
        """The C++ type of a weight. Raises TargetError where kernels have none."""
        return float_linear(str(self.dtype).removeprefix("torch.")).element_type

    @property
    def stored_name(self) -> str:
        """Instead of the program's tensor."""
        return f"{self.name}@t32"

    @property
    def packed(self) -> PackedWeight:
        """The matrix is unpacked by its shape and dtype."""
        return PackedWeight(
            stored=self.stored_name,
            rows=self.shape[0],
            width=self.shape[1],
            names=(self.name,),
            layout=str(self.dtype).removeprefix("torch."),
        )

    def expression(self, store: WeightStore) -> Expr:
        """Its tiles as bytes."""
        num_bytes = float_linear(str(self.dtype).removeprefix("torch.")).num_bytes(*self.shape)
        return PackedFloat(store[self.name], (num_bytes,))

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access."""
        address = f"(const {self.element}*){slots.pointer(self)}"
        return f"llmc::plain::Tiles<{self.element}>{{{address}, {self.shape[1]}}}"


@dataclass(frozen=True, slots=True)
class CodeMatrix:
    """A quantised matrix `[rows, width]`, packed for the integer kernels."""

    codes: str
    scales: str
    zeros: str | None
    rows: int
    width: int
    scheme: QuantScheme

    def kernel(self, limbs: int) -> IntegerLinear:
        """The kernel that multiplies with it. Raises TargetError where there is none."""
        return integer_linear(self.scheme, limbs=2 if limbs == 2 else 1)

    @property
    def stored_name(self) -> str:
        """Instead of codes, scales and zeros."""
        return f"{self.codes}@{self.kernel(1).layout.name}"

    @property
    def packed(self) -> PackedWeight:
        """Codes, scales and zeros are unpacked by the scheme."""
        names = (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)
        return PackedWeight(
            stored=self.stored_name, rows=self.rows, width=self.width, names=names, layout=self.scheme.name
        )

    def expression(self, store: WeightStore) -> Expr:
        """Its tiles as bytes."""
        zeros = None if self.zeros is None else store[self.zeros]
        num_bytes = self.kernel(1).layout.num_bytes(self.rows, self.width)
        return PackedCodes(
            store[self.codes], store[self.scales], zeros, self.scheme, self.width, (num_bytes,)
        )

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access."""
        kind = self.kernel(1).scheme_type
        return f"llmc::plain::CodeTiles<{kind}>{{(const uint8_t*){slots.pointer(self)}, {self.width}}}"


Matrix = StoredMatrix | CodeMatrix


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """Stacked unquantised matrices `[experts, rows, width]`, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access by row of all experts."""
        element = FLOAT_TYPES.get(str(self.dtype).removeprefix("torch."))
        if element is None:
            raise TargetError(
                "cpu.weight_dtype",
                f"Weight {self.name!r} is stored as {self.dtype}.",
                f"The CPU target multiplies matrices of {', '.join(FLOAT_TYPES)}, and quantised ones.",
                "Compile with --dtype float32 or bfloat16.",
            )
        address = f"(const {element}*){slots.pointer(StoredSlot(self.name))}"
        return f"llmc::plain::Rows<{element}>{{{address}, {self.shape[-1]}}}"


@dataclass(frozen=True, slots=True)
class CodeExperts:
    """Stacked quantised matrices, or a scheme without a tuned kernel, in the portable packing."""

    codes: str
    scales: str
    zeros: str | None
    width: int
    stored_bytes: int
    scheme: QuantScheme

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access by row of all experts."""
        groups = self.scheme.num_groups(self.width)
        size = self.scheme.group_size or self.scheme.padded_in_features(self.width)
        zeros = "nullptr"
        if self.zeros is not None:
            zeros = f"(const uint8_t*){slots.pointer(StoredSlot(self.zeros))}"
        codes, scales = (slots.pointer(StoredSlot(name)) for name in (self.codes, self.scales))
        sizes = f"{self.stored_bytes}, {groups}, {size}, {self.scheme.bits}"
        return f"llmc::plain::Codes{{(const uint8_t*){codes}, (const llmc::f16*){scales}, {zeros}, {sizes}}}"


Experts = StoredExperts | CodeExperts
