"""How weights reach generated code: which stored tensor each slot of the step is, and in what form.

Matrices of tuned kernels are packed in their layout; the rest is plain, or as the program has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...artifact.cpu import PackedWeight
from ...ir.weights import Cast, Expr, WeightStore
from ...kernels.catalog import IntegerLinear, float_linear, integer_linear
from ...kernels.tables import table_bytes, table_group, table_type
from ...spec.errors import TargetError
from ...spec.quant import QuantScheme, parse_activation
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
    """An unquantised matrix `[rows, width]`, or experts' `[experts, rows, width]`, in 32-row tiles of its own
    dtype."""

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
            experts=self.shape[0] if len(self.shape) == 3 else 0,
            rows=self.shape[-2],
            width=self.shape[-1],
            names=(self.name,),
            layout=str(self.dtype).removeprefix("torch."),
        )

    def expression(self, store: WeightStore) -> Expr:
        """Its tiles as bytes."""
        one = float_linear(str(self.dtype).removeprefix("torch.")).num_bytes(*self.shape[-2:])
        return PackedFloat(store[self.name], ((self.packed.experts or 1) * one,))

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access."""
        address = f"(const {self.element}*){slots.pointer(self)}"
        return f"llmc::plain::Tiles<{self.element}>{{{address}, {self.shape[-1]}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeNames:
    """The program's weights that are one quantised matrix, or the stacked ones of experts."""

    codes: str
    scales: str
    zeros: str | None
    experts: int
    rows: int
    width: int
    scheme: QuantScheme

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        parts = (self.codes, self.scales)
        return parts if self.zeros is None else (*parts, self.zeros)

    def packed_as(self, stored: str) -> PackedWeight:
        """How they are unpacked from the stored tensor."""
        return PackedWeight(
            stored=stored,
            experts=self.experts,
            rows=self.rows,
            width=self.width,
            names=self.names,
            layout=self.scheme.name,
        )

    def bytes_of(self, store: WeightStore, one: int) -> PackedCodes:
        """The packed tensor, `one` bytes a matrix."""
        zeros = None if self.zeros is None else store[self.zeros]
        shape = ((self.experts or 1) * one,)
        return PackedCodes(store[self.codes], store[self.scales], zeros, self.scheme, self.width, shape)


@dataclass(frozen=True, slots=True)
class CodeMatrix:
    """A quantised matrix, packed for the integer kernels."""

    of: CodeNames

    def kernel(self, activation: str) -> IntegerLinear:
        """The kernel that multiplies with it where activations are rounded as `activation` says: one int8
        limb for int8_*, two otherwise. Raises TargetError where there is none."""
        asked = parse_activation(activation)
        if asked is None:
            return integer_linear(self.of.scheme, limbs=2)
        if asked.codes == "fp8":
            raise no_activation(activation, "its integer products take int8 and int16 activations")
        limbs = 1 if asked.codes == "int8" else 2
        return integer_linear(self.of.scheme, limbs=limbs, activation_group=asked.group_size)

    @property
    def stored_name(self) -> str:
        """Instead of codes, scales and zeros."""
        return f"{self.of.codes}@{self.kernel('').layout.name}"

    @property
    def packed(self) -> PackedWeight:
        """Codes, scales and zeros are unpacked by the scheme."""
        return self.of.packed_as(self.stored_name)

    def expression(self, store: WeightStore) -> Expr:
        """Its tiles as bytes."""
        return self.of.bytes_of(store, self.kernel("").layout.num_bytes(self.of.rows, self.of.width))

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access."""
        kind = self.kernel("").scheme_type
        return f"llmc::plain::CodeTiles<{kind}>{{(const uint8_t*){slots.pointer(self)}, {self.of.width}}}"


@dataclass(frozen=True, slots=True)
class TableMatrix:
    """A quantised matrix in tiles for the kernels that look values up: any code type, any scale."""

    of: CodeNames

    @property
    def kind(self) -> str:
        """The C++ type of its codes."""
        return table_type(self.of.scheme)

    @property
    def stored_name(self) -> str:
        """Instead of codes, scales and zeros."""
        return f"{self.of.codes}@table"

    @property
    def packed(self) -> PackedWeight:
        """Codes, scales and zeros are unpacked by the scheme."""
        return self.of.packed_as(self.stored_name)

    def expression(self, store: WeightStore) -> Expr:
        """Its tiles as bytes."""
        return self.of.bytes_of(store, table_bytes(self.of.scheme, self.of.rows, self.of.width))

    def lookup(self, slots: WeightSlots) -> str:
        """C++ for random access."""
        size = table_group(self.of.scheme, self.of.width)
        address = f"(const uint8_t*){slots.pointer(self)}"
        return f"llmc::plain::TableTiles<{self.kind}>{{{address}, {self.of.width}, {size}}}"


def no_activation(name: str, why: str) -> TargetError:
    """The refusal of an activation scheme."""
    return TargetError(
        "cpu.activation_scheme",
        f"The program asks for activations rounded as {name}.",
        f"The CPU target cannot do that: {why}.",
        "Choose int8_token, int8_g32, int8_g128 or none (--set fp8.inputs= or, of a quantised checkpoint, "
        "--set keep_codes.round_inputs=false), or compile with --target reference.",
    )


Matrix = StoredMatrix | CodeMatrix | TableMatrix
