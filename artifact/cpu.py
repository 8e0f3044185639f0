"""The part of a CPU artifact that describes its generated code: `kernels/cpu.json`. Knows no execution."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..spec.errors import ArtifactError

CPU_UNIT = "kernels/cpu.json"
CPU_SOURCE = "kernels/model.cpp"


def library_path(level: str) -> str:
    """Where the shared library of an ISA level lies in the artifact."""
    return f"kernels/model-{level}.so"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLevel:
    """An ISA level with a library, and the words of the processor's feature list that it needs."""

    name: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A stored tensor that holds a matrix `[rows, width]` of the program in a kernel's layout, or one after
    the other those of as many `experts` (0: a matrix of its own).

    `layout` is a quantisation scheme, and `names` the program's codes, scales and zeros, or a
    floating-point dtype, and `names` the program's matrix.
    """

    stored: str
    rows: int
    width: int
    names: tuple[str, ...]
    layout: str
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUnit:
    """What generated code expects of its caller.

    A step takes at most `max_tokens` tokens and `max_logit_rows` rows of logits, and works in an arena
    of `arena_bytes`; `weights` names stored tensors in the order of its slots; `levels` are best first.
    """

    abi_version: int
    max_tokens: int
    max_logit_rows: int
    max_threads: int
    arena_bytes: int
    weights: tuple[str, ...]
    packed: tuple[PackedWeight, ...]
    levels: tuple[CpuLevel, ...]
    compiler: str


def encode_unit(unit: CpuUnit) -> bytes:
    """`unit` as the bytes of its file."""
    return msgspec.json.format(msgspec.json.encode(unit, order="deterministic"), indent=1) + b"\n"


def decode_unit(data: bytes) -> CpuUnit:
    """Inverse of `encode_unit`. Raises ArtifactError for anything else."""
    try:
        return msgspec.json.decode(data, type=CpuUnit)
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            "artifact.cpu_unit",
            "The description of the generated code cannot be read.",
            f"{CPU_UNIT}: {error}.",
            "Compile the model again.",
        ) from error
