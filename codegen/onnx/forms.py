"""How quantised weights lie in the file: codes as ONNX's operators want them, for each a way back.

`Shifted` adds a number to every code: MatMulNBits takes symmetric codes with half their range added, and
DequantizeLinear takes them in two's complement; which of the two bits a scheme stores already differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...artifact.onnx import CodeShift, PackedZeros, StoredForms
from ...ir import ops as _registered  # noqa: F401 # pyright: ignore[reportUnusedImport] - registers them
from ...ir.arguments import argument
from ...ir.program import Program
from ...ir.weights import Expr, Reader, SameForm, WeightStore
from ...spec.errors import TargetError
from ...spec.quant import QuantScheme, parse_scheme
from .mixtures import is_to_be_interleaved, misfit

_LINEAR = torch.ops.llmc.quantized_linear.default
_EMBEDDING = torch.ops.llmc.quantized_embedding.default
_MOE = torch.ops.llmc.quantized_moe.default
# Operators take groups of these sizes: powers of two from 16 on.
_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Shifted:
    """`of` with `shift` added to each code of `bits` (modulo 2**bits); its bytes are of `dtype`."""

    of: Expr
    bits: int
    shift: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As `of`."""
        return tuple(self.of.shape)

    def evaluate(self, reader: Reader) -> Tensor:
        """The shifted codes."""
        whole = self.of.evaluate(reader).contiguous().view(torch.uint8)
        if self.bits == 8:
            return (whole + self.shift % 256).view(self.dtype)
        shift = self.shift % 16
        low, high = (whole + shift) & 0x0F, ((whole >> 4) + shift) << 4
        return (low | high).view(self.dtype)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Zero points `of[..., G]`, packed two to a byte: `[..., ceil(G / 2)]`, the first in the low half."""

    of: Expr
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Half as many columns."""
        *rows, groups = self.of.shape
        return (*rows, -(-groups // 2))

    def evaluate(self, reader: Reader) -> Tensor:
        """The packed zero points."""
        zeros = self.of.evaluate(reader)
        padded = torch.nn.functional.pad(zeros, (0, zeros.shape[-1] % 2))
        return padded[..., 0::2] | (padded[..., 1::2] << 4)


@dataclass(frozen=True, slots=True)
class Bytes:
    """Inverse of `Nibbles`: `[..., groups]`."""

    of: Expr
    groups: int
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """One column a group."""
        return (*self.of.shape[:-1], self.groups)

    def evaluate(self, reader: Reader) -> Tensor:
        """The zero points."""
        packed = self.of.evaluate(reader)
        return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)[..., : self.groups]


@dataclass(frozen=True, slots=True)
class Alternating(SameForm):
    """`of[E, 2F, ...]` with rows of its first and second half in turn, or, where `back`, the inverse."""

    back: bool = False

    def evaluate(self, reader: Reader) -> Tensor:
        """The rows in their order."""
        whole = self.of.evaluate(reader)
        experts, rows, *rest = whole.shape
        halves = (rows // 2, 2) if self.back else (2, rows // 2)
        return whole.reshape(experts, *halves, *rest).transpose(1, 2).reshape(whole.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The weights of one quantised matrix: names of codes, scales and zeros, and the scheme."""

    codes: str
    scales: str
    zeros: str | None
    scheme: QuantScheme


def quantized_parts(program: Program) -> Iterator[tuple[fx.Node, Parts]]:
    """Every quantised matrix of `program`, with each node that reads it."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (_LINEAR, _EMBEDDING):
            yield node, parts_of(node, "", "scheme")
        elif node.target is _MOE:
            yield node, parts_of(node, "gate_up_", "gate_up_scheme")
            yield node, parts_of(node, "down_", "down_scheme")


def parts_of(node: fx.Node, prefix: str, scheme: str) -> Parts:
    """The parts that one node reads. Raises TargetError for a scheme that no ONNX operator holds."""
    names = [argument(node, f"{prefix}{part}") for part in ("codes", "scales", "zeros")]
    parsed = parse_scheme(str(argument(node, scheme)))
    check_scheme(parsed, str(names[0].target))
    return Parts(
        codes=str(names[0].target),
        scales=str(names[1].target),
        zeros=None if names[2] is None else str(names[2].target),
        scheme=parsed,
    )


def check_scheme(scheme: QuantScheme, weight: str) -> None:
    """Raises TargetError naming the nearest scheme that fits, where ONNX has no operator for `scheme`."""
    is_held = scheme.code_type == "int" and not scheme.block_rows and scheme.group_size in (0, *_SIZES)
    if is_held and scheme.scale_dtype in ("float16", "float32", "bfloat16"):
        return
    size = min(_SIZES, key=lambda known: (abs(known - scheme.group_size), known)) if scheme.group_size else 0
    bits = 8 if scheme.bits == 8 else 4
    nearest = QuantScheme(bits=bits, group_size=size, symmetric=scheme.symmetric)
    raise TargetError(
        "onnx.scheme",
        f"ONNX has no operator for weights of scheme {scheme.name!r}.",
        f"{weight} has it; the operators hold integers of 3, 4 or 8 bits with one scale a row, or a group of "
        f"{', '.join(map(str, _SIZES))}.",
        f"Choose {nearest.name}, the nearest that fits, or compile for another target.",
    )


def chosen_activations(final: Program) -> dict[str, str]:
    """How the final program rounds the inputs of its products, by the name of the codes: kernels are chosen
    after the lay-out stage."""
    return {
        str(argument(node, "codes").target): str(argument(node, "activation"))
        for node in final.graph.nodes
        if node.target is _LINEAR and argument(node, "activation")
    }


def block_of(scheme: QuantScheme, width: int) -> int:
    """The group size that a block operator is given for rows of `width`; 0 where none fits. Blocks are powers
    of two and at least 16; one scale a row becomes equal scales of as many blocks as divide it."""
    if scheme.group_size:
        return scheme.group_size
    block = min(width & -width, _SIZES[-1])
    return block if block >= _SIZES[0] else 0


def _shift_of(scheme: QuantScheme, by_blocks: bool) -> int:
    """What is added to the portable codes of `scheme`: symmetric ones become unsigned around the middle for
    block operators, signed for DequantizeLinear; asymmetric ones stay."""
    if not scheme.symmetric:
        return 0
    if scheme.bits == 8:
        return 128 if by_blocks else 0
    middle = 1 << (scheme.bits - 1)
    return 8 - middle if by_blocks else -middle


def stored_forms(program: Program, contrib: bool) -> StoredForms:
    """How the quantised weights of `program` lie in the file."""
    shifts: dict[str, CodeShift] = {}
    zeros: dict[str, PackedZeros] = {}
    alternating: dict[str, None] = {}
    for node, parts in quantized_parts(program):
        scheme, by_blocks = parts.scheme, contrib and _takes_blocks(node, parts.scheme)
        # Experts outside of QMoE are unpacked by plain operators, which find nibbles without a sign easier.
        shift = _shift_of(scheme, by_blocks or (node.target is _MOE and scheme.bits != 8))
        if shift:
            bits = 8 if scheme.bits == 8 else 4
            shifts[parts.codes] = CodeShift(name=parts.codes, bits=bits, shift=shift)
        if parts.zeros is not None and scheme.bits != 8 and by_blocks:
            groups = int(program.weights[parts.zeros].shape[-1])
            zeros[parts.zeros] = PackedZeros(name=parts.zeros, groups=groups)
        if contrib and node.target is _MOE and not misfit(node) and is_to_be_interleaved(node):
            alternating |= dict.fromkeys(_gate_up_weights(node))
    return StoredForms(
        shifts=tuple(shifts.values()), zeros=tuple(zeros.values()), alternating=tuple(alternating)
    )


def _gate_up_weights(node: fx.Node) -> list[str]:
    """The names of everything stored of the first product's rows."""
    names = [f"gate_up_{part}" for part in ("codes", "scales", "zeros", "bias")]
    return [str(weight.target) for name in names if (weight := argument(node, name)) is not None]


def _takes_blocks(node: fx.Node, scheme: QuantScheme) -> bool:
    """Whether there is a block operator for what `node` computes with a matrix of `scheme`."""
    return not misfit(node) if node.target is _MOE else block_of(scheme, _width(node)) > 0


def _width(node: fx.Node) -> int:
    """Weights in a row of what a linear or a table reads."""
    if node.target is _EMBEDDING:
        return int(argument(node, "width"))
    return int(argument(node, "x").meta["val"].shape[-1])


def stored_store(store: WeightStore, forms: StoredForms) -> WeightStore:
    """`store` with codes and zero points in the forms they are stored in."""
    entries: dict[str, Expr] = dict(store.entries)
    for name in forms.alternating:
        entries[name] = Alternating(entries[name])
    for shift in forms.shifts:
        of = entries[shift.name]
        dtype = torch.uint8 if shift.bits == 8 and shift.shift else of.dtype
        entries[shift.name] = Shifted(of, shift.bits, shift.shift, dtype)
    for packed in forms.zeros:
        entries[packed.name] = Nibbles(entries[packed.name])
    return WeightStore(entries, store.ties, store.reader)


def portable_entries(stored: dict[str, Expr], forms: StoredForms) -> dict[str, Expr]:
    """Inverse of `stored_store` on what was read back."""
    entries = dict(stored)
    for shift in forms.shifts:
        dtype = torch.int8 if shift.bits == 8 else torch.uint8
        entries[shift.name] = Shifted(stored[shift.name], shift.bits, -shift.shift, dtype)
    for packed in forms.zeros:
        entries[packed.name] = Bytes(stored[packed.name], packed.groups)
    for name in forms.alternating:
        entries[name] = Alternating(entries[name], back=True)
    return entries
