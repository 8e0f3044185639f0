"""ISA levels of the CPU target: how each is compiled, and what a processor must offer to run it.

Knows names and flags only; which level a machine takes is decided where it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One instruction-set level. `flags` go to the compiler; `features` are words of the `flags` line of
    /proc/cpuinfo that must all be present."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


# Without these a compiler may fuse, reorder or assume its way to other bits.
NUMERIC_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno")

GENERIC = Level(name="generic", flags=("-DLLMC_GENERIC=1",), features=frozenset())
AVX2 = Level(
    name="avx2",
    flags=("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    features=frozenset({"avx2", "fma", "f16c", "bmi2"}),
)
AVX512VNNI = Level(
    name="avx512vnni",
    flags=(
        *AVX2.flags,
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mprefer-vector-width=512",
    ),
    features=AVX2.features | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
)

AMX = Level(
    name="amx",
    flags=(*AVX512VNNI.flags, "-mamx-tile", "-mamx-int8"),
    features=AVX512VNNI.features | {"amx_tile", "amx_int8"},
)

LEVELS = (GENERIC, AVX2, AVX512VNNI, AMX)  # slowest first


def supported_levels(cpu_features: frozenset[str]) -> tuple[Level, ...]:
    """The levels that a processor with these features runs, slowest first."""
    return tuple(level for level in LEVELS if level.features <= cpu_features)


def missing_features(level: Level, cpu_features: frozenset[str]) -> tuple[str, ...]:
    """What a processor lacks to run `level`, sorted; empty when it runs."""
    return tuple(sorted(level.features - cpu_features))
