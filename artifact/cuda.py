"""The part of a CUDA artifact that describes its kernels: `kernels/cuda.json`. Knows no execution."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..spec.errors import ArtifactError

CUDA_UNIT = "kernels/cuda.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernel:
    """A kernel compiled for one architecture (`sm_90`).

    `toolkit` is the version of CUDA whose assembler made it. `key` names the specialisation that a launch
    asks for, `name` the function in `file`, which is a cubin. `parameters` are name and type (`*bf16`, `i32`,
    `fp32`) of what a launch passes, in order; two null pointers follow. A block has `32 * warps` threads;
    pointers are multiples of 16 bytes. `ptx` is a file that the driver of a GPU of another architecture can
    compile, empty when there is none. With `overlaps` it waits for the launches before it by itself, and
    may begin before they have ended.
    """

    key: str
    architecture: str
    file: str
    name: str
    parameters: tuple[tuple[str, str], ...]
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    toolkit: str
    ptx: str = ""
    overlaps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WordWeight:
    """A stored tensor of words that holds the program's codes `codes`, `[rows, width]` bytes there, or
    `[experts, rows, width]`."""

    stored: str
    codes: str
    rows: int
    width: int
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return (self.experts, self.rows, self.width) if self.experts else (self.rows, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """The captured step of `rows` rows works in `num_bytes` of memory: the n-th tensor that its operators
    make lies at `offsets[n]`."""

    rows: int
    offsets: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductVariant:
    """What a class of products (`kernels.cuda.variants`) takes: columns of the weight and warps of a program,
    and loads ahead; and how that was chosen."""

    product: str
    columns: int
    warps: int
    stages: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaUnit:
    """All kernels of an artifact, for every architecture, the weights that they read in a form of their own,
    and the memory of captured steps, fewest rows first. `variants` are the choices for all its
    products; `tuned_on` is the device that some were measured on, where any was."""

    triton: str
    kernels: tuple[CudaKernel, ...]
    words: tuple[WordWeight, ...]
    arenas: tuple[ArenaPlan, ...] = ()
    variants: tuple[ProductVariant, ...] = ()
    tuned_on: str = ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """Those that kernels are compiled for, in their order of appearance."""
        return tuple(dict.fromkeys(kernel.architecture for kernel in self.kernels))


def encode_unit(unit: CudaUnit) -> bytes:
    """`unit` as the bytes of its file."""
    return msgspec.json.format(msgspec.json.encode(unit, order="deterministic"), indent=1) + b"\n"


def decode_unit(data: bytes) -> CudaUnit:
    """Inverse of `encode_unit`. Raises ArtifactError for anything else."""
    try:
        return msgspec.json.decode(data, type=CudaUnit)
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            "artifact.cuda_unit",
            "The description of the kernels cannot be read.",
            f"{CUDA_UNIT}: {error}.",
            "Compile the model again.",
        ) from error
