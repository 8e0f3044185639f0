"""Files that every backend writes in the same way: programs as data and text, weights streamed from the
store. Knows no target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.reader import Artifact
from ..artifact.schema import PORTABLE_PROGRAM, PROGRAM, PROGRAM_TEXT
from ..artifact.tensors import TensorSpec
from ..artifact.writer import ArtifactWriter
from ..ir.document import encode_program
from ..ir.printer import print_program
from ..ir.program import Program
from ..ir.weights import Expr, Source, WeightStore
from ..spec.errors import InternalError

SHARD_BYTES = 4 * 2**30


def write_programs(program: Program, portable: Program, writer: ArtifactWriter) -> None:
    """Writes the final program as data and as text, and the portable one as data."""
    writer.write_bytes(PROGRAM, "program", encode_program(program))
    writer.write_bytes(PROGRAM_TEXT, "program", print_program(program).encode())
    writer.write_bytes(PORTABLE_PROGRAM, "program", encode_program(portable))


def shared_weights(program: Program, portable: Program) -> WeightStore:
    """The weights that either program reads, those of `program` first, in order of use.

    Raises InternalError when both use one name for tensors of another shape or dtype.
    """
    names = list(dict.fromkeys((*program.used_weights(), *portable.used_weights())))
    for name in names:
        if name in program.weights and name in portable.weights:
            ours, theirs = program.weights[name], portable.weights[name]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise InternalError(
                    "codegen.weight_clash",
                    f"The weight {name!r} means two things.",
                    f"It is {ours.dtype}{list(ours.shape)} in the final program and "
                    f"{theirs.dtype}{list(theirs.shape)} before the lay-out stage.",
                    "This is a defect of the pass that changed it: a packed weight needs a name of its own.",
                )
    entries = {
        name: program.weights[name] if name in program.weights else portable.weights[name] for name in names
    }
    return WeightStore(entries, program.weights.ties, program.weights.reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProgress:
    """Reported before each weight is evaluated."""

    name: str
    done_bytes: int
    total_bytes: int


def write_weights(
    store: WeightStore,
    writer: ArtifactWriter,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[WeightProgress], None] | None = None,
) -> None:
    """Writes every weight of `store` in its order, one in memory at a time, as
    `weights-00001.safetensors` and so on, each file of at most `shard_bytes` (or one larger tensor)."""
    done, total = 0, store.total_bytes

    def fetch(name: str) -> NDArray[Any]:
        nonlocal done
        if progress is not None:
            progress(WeightProgress(name=name, done_bytes=done, total_bytes=total))
        done += store.num_bytes(name)
        return tensor_bytes(store.evaluate(name))

    for number, names in enumerate(_shards(store, shard_bytes), start=1):
        specs = [_spec_of(store, name) for name in names]
        writer.write_tensors(f"weights-{number:05}.safetensors", "weights", specs, fetch)


def stored_sources(artifact: Artifact) -> dict[str, Expr]:
    """Every weight file's tensors as they lie."""
    return {
        name: Source(str(artifact.path / file), name, view.shape, getattr(torch, view.dtype))
        for file, views in artifact.weight_files()
        for name, view in views.items()
    }


def tensor_bytes(tensor: Tensor) -> NDArray[Any]:
    """The bytes of `tensor` in row-major order, as uint8; no copy where they lie so already."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in artifacts."""
    return str(dtype).removeprefix("torch.")


def _spec_of(store: WeightStore, name: str) -> TensorSpec:
    return TensorSpec(name, dtype_name(store[name].dtype), tuple(store[name].shape))


def _shards(store: WeightStore, shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name in store:
        size = store.num_bytes(name)
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    if shard:
        yield shard
