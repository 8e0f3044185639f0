"""Generated code with its weights and caches: runs steps. Knows arrays and pages; no requests, no torch."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...artifact.cpu import CpuUnit
from ...spec.cache import CacheLayout
from ...spec.errors import InternalError
from ..protocol import BlockCopy
from .cpu_library import NO_JOBS, CpuLibrary, Jobs, StepInputs, aligned_empty, aligned_zeros
from .tiles import SequencePart, TileLogits, split_tiles

Owner = tuple[int, int]
# Kernels prefetch and load whole vectors beyond the end of a packed matrix.
_SLACK_BYTES = 8192
_HUGE_PAGE = 2 << 20
_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def resident(weights: Sequence[NDArray[Any]]) -> list[NDArray[np.uint8]]:
    """Copies of `weights` in one anonymous region of large pages, each aligned to a cache line with
    readable bytes behind it, as kernels want them: mapped files stream at two thirds of the bandwidth.
    Pages of a mapped file are given back as soon as they are copied, so that weights are resident once.
    """
    offsets = [0, *accumulate(-(-(weight.nbytes + _SLACK_BYTES) // 64) * 64 for weight in weights)]
    # Private: shared anonymous memory, Python's default, gets no large pages.
    region = mmap.mmap(-1, max(offsets[-1], 1) + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, dtype=np.uint8)
    whole = whole[-whole.ctypes.data % _HUGE_PAGE :]
    copies: list[NDArray[np.uint8]] = []
    for offset, weight in zip(offsets, weights, strict=False):
        copy = whole[offset : offset + weight.nbytes]
        copy[:] = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
        _forget(weight)
        copies.append(copy)
    return copies


def _forget(weight: NDArray[Any]) -> None:
    """Gives the pages of an array back that is a part of a mapped file; they can be read again."""
    owner: Any = weight
    while isinstance(owner, np.ndarray):
        owner = cast(Any, owner).base
    if isinstance(owner, mmap.mmap) and weight.nbytes:
        first = weight.ctypes.data - np.frombuffer(owner, dtype=np.uint8).ctypes.data
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        owner.madvise(mmap.MADV_DONTNEED, start, first + weight.nbytes - start)


class CpuModel:
    """One program's generated code over its own caches. Not thread-safe.

    `weights` are in the order of the unit's slots; they are copied.
    """

    def __init__(
        self,
        library: Path,
        unit: CpuUnit,
        weights: list[NDArray[Any]],
        layout: CacheLayout,
        num_pages: tuple[int, ...],
        vocab_size: int,
        num_threads: int,
    ) -> None:
        self._layout = layout
        self._unit = unit
        self._caches = _allocate(layout, num_pages)
        self._logits = np.empty((unit.max_logit_rows, vocab_size), dtype=np.float32)
        self._logits_address = int(self._logits.ctypes.data)
        self._open = partial(
            CpuLibrary,
            library,
            caches=[self._caches[layer] for layer in sorted(self._caches)],
            num_pages=num_pages,
            weights=resident(weights),
            arena=aligned_empty(unit.arena_bytes),
        )
        self._library = self._open(num_threads=num_threads)

    @property
    def library(self) -> CpuLibrary:
        """The engine that runs its steps."""
        return self._library

    @property
    def layout(self) -> CacheLayout:
        """Of its caches."""
        return self._layout

    @property
    def logits_address(self) -> int:
        """Where the logits of its steps begin."""
        return self._logits_address

    def beside(self) -> CpuLibrary:
        """Another engine over the same weights, caches and arena, of one thread: whose steps never run while
        others of this model do."""
        return self._open(num_threads=1)

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Run one step, in as few calls as its bounds allow, writing K and V of every token; yields the
        logits that `wanted` of each sequence asks for as they come, in memory that the next call reuses."""
        yield from self.run_jobs(sequences, lambda owners: NO_JOBS)

    def run_jobs(
        self, sequences: Sequence[SequencePart], jobs_of: Callable[[tuple[Owner, ...]], Jobs]
    ) -> Iterator[TileLogits]:
        """The same; each call carries out the jobs that `jobs_of` gives for the owners of its logits."""
        num_wanted = sum(len(sequence.wanted) for sequence in sequences)
        size = self._unit.max_tokens if num_wanted <= self._unit.max_logit_rows else self._unit.max_logit_rows
        for tile in split_tiles(sequences, size):
            parts = [part for _, _, part in tile]
            owners = tuple((index, offset + token) for index, offset, part in tile for token in part.wanted)
            self._library.step(step_inputs(self._layout, parts, self._logits_address, jobs_of(owners)))
            if owners:
                yield TileLogits(owners=owners, logits=self._logits[: len(owners)])

    def takes(self, sequences: Sequence[SequencePart]) -> bool:
        """Whether one call takes all of `sequences`."""
        num_tokens = num_wanted = 0
        for sequence in sequences:
            num_tokens += len(sequence.token_ids)
            num_wanted += len(sequence.wanted)
        return num_wanted <= self._unit.max_logit_rows and num_tokens <= self._unit.max_tokens

    def run_once(self, sequences: Sequence[SequencePart], jobs: Jobs, rounds: int = 1) -> array[int]:
        """Runs `sequences`, which it `takes`, in one call, and carries out `jobs`. With several rounds the
        job of each sequence, of which the last token is wanted, draws the token that it goes on with: gives
        the tokens `[rounds, sequences]`, -1 where there is none."""
        return self._library.step(step_inputs(self._layout, sequences, self._logits_address, jobs), rounds)

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copy physical pages within their groups, in order."""
        for copy in copies:
            for layer in self._layout.groups[copy.group].layers:
                for cache in self._caches[layer]:
                    cache[copy.target] = cache[copy.source]

    def close(self) -> None:
        """End the threads of the generated code. Idempotent."""
        self._library.close()


def step_inputs(
    layout: CacheLayout, sequences: Sequence[SequencePart], logits: int, jobs: Jobs
) -> StepInputs:
    """The inputs of one step: rows of a sequence are contiguous, in the order given. `logits` is where those
    of the wanted tokens go."""
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    starts = [0]
    num_tokens = 0
    for part in sequences:
        count = len(part.token_ids)
        token_ids += part.token_ids
        positions += range(part.start, part.start + count)
        rows += [num_tokens + token for token in part.wanted]
        num_tokens += count
        starts.append(num_tokens)
    offsets = [0, num_tokens, 2 * num_tokens, 2 * num_tokens + len(rows)]
    values = [*token_ids, *positions, *rows, *starts]
    widths: list[int] = []
    for index, group in enumerate(layout.groups):
        tables = [part.block_tables[index] for part in sequences]
        widths.append(max(1, max(map(len, tables), default=0)))
        offsets.append(len(values))
        slots: list[int] = []
        for part, table in zip(sequences, tables, strict=True):
            values += table
            values += [-1] * (widths[-1] - len(table))
            slots += _slots(table, part.start, len(part.token_ids), group.page_tokens)
        offsets.append(len(values))
        values += slots
    return StepInputs(
        values=array("q", values),
        offsets=tuple(offsets),
        widths=tuple(widths),
        num_tokens=num_tokens,
        num_rows=len(rows),
        num_sequences=len(sequences),
        logits=logits,
        jobs=jobs,
    )


def _slots(table: Sequence[int], start: int, count: int, page_tokens: int) -> Sequence[int]:
    """Where the keys and values of `count` tokens from position `start` go."""
    index, offset = divmod(start, page_tokens)
    if offset + count <= page_tokens and index < len(table) and table[index] >= 0:
        first = table[index] * page_tokens + offset
        return range(first, first + count)
    slots: list[int] = []
    position, end = start, start + count
    while position < end:
        index, offset = divmod(position, page_tokens)
        page = table[index] if index < len(table) else -1
        if page < 0:
            raise _no_page(position)
        first, num_here = page * page_tokens + offset, min(end - position, page_tokens - offset)
        slots.extend(range(first, first + num_here))
        position += num_here
    return slots


def _no_page(position: int) -> InternalError:
    return InternalError(
        "runtime.no_page",
        f"The token at position {position} has no page in its block table.",
        "Pages of every token of a step must be reserved before it runs.",
        "Report this with the request mix that led to it.",
    )


def _allocate(
    layout: CacheLayout, num_pages: Sequence[int]
) -> dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Bytes `[pages, bytes of a page]` of keys and of values for each owning layer; how tokens lie in a page
    is the kernels' (kernels/cpu/kv_cache.hpp: widths rounded up to 4, scales of codes inside). Pages take
    memory when they are first written."""
    caches: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    for group, pages in zip(layout.groups, num_pages, strict=True):
        rows = pages * group.page_tokens * group.num_kv_heads
        scale = 4 if group.scales else 0
        sizes = [
            -(-width // 4) * 4 * _CACHE_BYTES[group.dtype] + scale for width in (group.k_dim, group.v_dim)
        ]
        for layer in group.layers:
            k, v = (aligned_zeros(rows * size).reshape(pages, -1) for size in sizes)
            caches[layer] = (k, v)
    return caches
