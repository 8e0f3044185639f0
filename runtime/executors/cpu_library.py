"""A generated shared library and its C ABI, through ctypes. Knows fields and pointers; no requests."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...spec.errors import ArtifactError, InternalError

ABI_VERSION = 1
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """What changes from step to step: int64 arrays (contiguous), and where the logits go."""

    input_ids: Array
    positions: Array
    out_rows: Array
    query_starts: Array
    block_tables: tuple[Array, ...]
    slots: tuple[Array, ...]
    logits: Array


class CpuLibrary:
    """One engine: a loaded library with its threads, bound to caches, weights and an arena.

    Arrays given here must outlive the library; their addresses are taken once.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_threads: int,
        caches: list[tuple[Array, Array]],
        num_pages: tuple[int, ...],
        weights: list[Array],
        arena: Array,
    ) -> None:
        self._library = ctypes.CDLL(str(path))
        self._declare()
        found = self._library.llmc_abi_version()
        if found != ABI_VERSION:
            raise ArtifactError(
                "artifact.cpu_abi",
                "The generated code of this artifact speaks another interface.",
                f"It has version {found}; this llmc calls version {ABI_VERSION}.",
                "Compile the model again with this version of llmc.",
            )
        self._num_threads = num_threads
        self._num_pages = list(num_pages)
        self._tail = [_address(k) for k, _ in caches] + [_address(v) for _, v in caches]
        self._tail += [_address(weight) for weight in weights] or [0]
        scratch = aligned_empty(self._library.llmc_scratch_bytes(num_threads))
        self._tail += [_address(arena), _address(scratch)]
        self._alive = (caches, weights, arena, scratch)
        self._engine: int | None = self._library.llmc_open(num_threads)

    def step(self, arrays: StepArrays) -> None:
        """Run one step; `arrays.logits` is filled."""
        if self._engine is None:
            raise InternalError(
                "runtime.cpu_closed",
                "A step was asked of a closed engine.",
                "Its threads have ended.",
                "Report this with the runtime settings that led to it.",
            )
        num_sequences = len(arrays.query_starts) - 1
        fields = [len(arrays.input_ids), len(arrays.out_rows), num_sequences, num_sequences + 1]
        fields.append(self._num_threads)
        whole = (arrays.input_ids, arrays.positions, arrays.out_rows, arrays.query_starts)
        fields += [_address(array) for array in (*whole, *arrays.block_tables, *arrays.slots)]
        fields += [table.shape[1] for table in arrays.block_tables]
        fields += [*self._num_pages, *self._tail, _address(arrays.logits)]
        packed = (ctypes.c_int64 * len(fields))(*fields)
        if self._library.llmc_step(self._engine, packed, len(fields)) != 0:
            raise ArtifactError(
                "artifact.cpu_fields",
                "The generated code does not fit its description.",
                f"It expects another number of inputs than the {len(fields)} it was given.",
                "Compile the model again.",
            )

    def close(self) -> None:
        """End the engine's threads. Idempotent."""
        if self._engine is not None:
            self._library.llmc_close(self._engine)
            self._engine = None

    def _declare(self) -> None:
        library = self._library
        library.llmc_abi_version.restype = ctypes.c_int32
        library.llmc_scratch_bytes.restype = ctypes.c_int64
        library.llmc_scratch_bytes.argtypes = [ctypes.c_int32]
        library.llmc_open.restype = ctypes.c_void_p
        library.llmc_open.argtypes = [ctypes.c_int32]
        library.llmc_close.argtypes = [ctypes.c_void_p]
        library.llmc_step.restype = ctypes.c_int32
        library.llmc_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64]


def _address(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def aligned_empty(num_bytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Uninitialised bytes at an aligned address."""
    raw = np.empty(num_bytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes]
