"""What a CPU matrix product takes, predicted from its bytes and operations. Torch-free; measures nothing.

The rates are of bench/results/cpu_kernels.json: one thread of an AMD EPYC 9004 (Zen 4), AVX-512 VNNI.
"""

from __future__ import annotations

from dataclasses import dataclass

from .catalog import IntegerLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Limits of one thread: bytes a second from memory, integer operations a second from registers, and the
    share of the latter that products reach of what their instructions allow."""

    stream_bytes: float
    integer_operations: float
    reached: float


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
