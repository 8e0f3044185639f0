"""Which CPU kernel takes which weights, what it needs and what it takes. Knows no graph; chooses nothing.

The C++ side of each entry is described in docs/design/cpu-kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..spec.errors import TargetError
from ..spec.quant import QuantScheme
from .packing import SLACK_BYTES, TILE_ROWS, Layout, layout_of

FLOAT_TYPES = {"float32": "float", "float16": "llmc::f16", "bfloat16": "llmc::bf16"}
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ACTIVATION_GROUPS = (0, 32, 64, 128)
WHOLE_ROW = 1 << 30  # the C++ activation group of one scale a row
NORM_STYLES = ("cast_then_scale", "scale_then_cast")  # the same for float32 activations
ROPE_STYLES = ("half", "interleaved", "interleaved_to_half")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "clamped_swiglu")
CACHE_DTYPES = ("float32", "bfloat16", "int8")
PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLinear:
    """A product of packed integer codes with activations of `limbs` int8 digits (1 fast, 2 accurate),
    one activation scale per row and `activation_group` (0: per row)."""

    layout: Layout
    limbs: Literal[1, 2]
    activation_group: int

    @property
    def unit(self) -> int:
        """Activations summed in integers before a scale is applied."""
        return min(self.layout.group, self.activation_group or WHOLE_ROW)

    @property
    def scheme_type(self) -> str:
        """The C++ type that names the product."""
        zeros = "true" if self.layout.zeros else "false"
        return f"llmc::Scheme<{self.layout.bits}, {self.layout.group}, {self.unit}, {self.limbs}, {zeros}>"

    def quant_row_bytes(self, in_features: int) -> int:
        """Scratch bytes that one quantised row of activations takes (`quant_rows_bytes`)."""
        groups = self.layout.num_groups(in_features)
        code_stride = _round_up(groups * self.layout.group, 64) + 64
        unit_stride = _round_up(groups * self.layout.group // self.unit, 16)
        return self.limbs * code_stride + 4 * (self.limbs + 1) * unit_stride


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLinear:
    """A product with float32, float16 or bfloat16 weights in 32-row tiles and float32 activations."""

    dtype: str

    @property
    def element_type(self) -> str:
        """The C++ type of a stored weight."""
        return FLOAT_TYPES[self.dtype]

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Size of the packed matrix, without slack."""
        item = FLOAT_BYTES[self.dtype]
        width = in_features + in_features % 2 if item == 2 else in_features
        return -(-out_features // TILE_ROWS) * TILE_ROWS * width * item


def integer_linear(
    scheme: QuantScheme, *, limbs: Literal[1, 2] = 1, activation_group: int | None = None
) -> IntegerLinear:
    """The kernel for weights of `scheme`. `activation_group` is 32, 64, 128, or 0 for one scale a row; by
    default the layout's.

    Raises TargetError where there is none.
    """
    layout = layout_of(scheme)
    group = layout.group if activation_group is None else activation_group
    if group not in ACTIVATION_GROUPS:
        raise TargetError(
            "target.activation_group",
            f"Activations cannot be quantised in groups of {group}.",
            f"CPU kernels take groups of {', '.join(map(str, ACTIVATION_GROUPS[1:]))}, or whole rows.",
            "Choose one of these.",
        )
    return IntegerLinear(layout=layout, limbs=limbs, activation_group=group)


def float_linear(dtype: str) -> FloatLinear:
    """The kernel for unquantised weights of `dtype`. Raises TargetError where there is none."""
    if dtype not in FLOAT_TYPES:
        raise TargetError(
            "target.weight_dtype",
            f"The CPU target cannot multiply with {dtype} weights.",
            f"Its kernels read {', '.join(FLOAT_TYPES)}.",
            "Convert the weights, or quantise them.",
        )
    return FloatLinear(dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Limits of one thread: bytes a second from memory, integer operations a second from registers, and the
    share of the latter that products reach of what their instructions allow."""

    stream_bytes: float
    integer_operations: float
    reached: float


# Of bench/results/cpu_kernels.json: AMD EPYC 9004 (Zen 4), AVX-512 VNNI.
MEASURED = Rates(stream_bytes=29e9, integer_operations=470e9, reached=0.94)


def integer_seconds(
    kernel: IntegerLinear, out_features: int, in_features: int, rows: int, rates: Rates = MEASURED
) -> float:
    """Seconds of one thread for `rows` rows: the longer of reading the codes and multiplying them.

    A unit's sums take one multiply and one multiply-add in the slots of the dot products.
    """
    reading = kernel.layout.num_bytes(out_features, in_features) / rates.stream_bytes
    dots = kernel.limbs * kernel.unit / 4
    share = rates.reached * dots / (dots + 2)
    operations = 2 * kernel.limbs * rows * out_features * in_features
    return max(reading, operations / (rates.integer_operations * share))


def allocated_bytes(num_bytes: int) -> int:
    """What to allocate for a packed array of `num_bytes`: kernels may read beyond its end."""
    return _round_up(num_bytes, 64) + SLACK_BYTES


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
