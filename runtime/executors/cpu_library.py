"""A generated shared library and its C ABI, through ctypes. Knows fields and pointers; no requests."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...spec.errors import ArtifactError, InternalError, TargetError

ABI_VERSION = 4
Array = NDArray[Any]
# What `StepFault` in kernels/cpu/step.hpp says is wrong, by its number.
_FAULTS = (
    "",
    "it expects another number of inputs",
    "its sizes are beyond those it was generated for",
    "its sequences do not follow each other",
    "a token id lies outside of the vocabulary",
    "the positions of a sequence are not consecutive, or beyond the context",
    "a row whose logits are wanted is none of the step's",
    "a page that a query sees is not in the cache",
    "a slot lies outside of the cache",
    "what is to be sampled does not fit the step",
    "its sequences cannot go on for as many rounds",
    "no drafts can be drawn behind it",
)
# One `SampleJob` of kernels/cpu/sample_step.hpp.
SAMPLE_JOB = np.dtype(
    [
        ("temperature", "f4"),
        ("repetition_penalty", "f4"),
        ("presence_penalty", "f4"),
        ("frequency_penalty", "f4"),
        ("min_p", "f8"),
        ("top_p", "f8"),
        ("seed", "u8"),
        ("top_k", "i8"),
        ("min_tokens", "i8"),
        ("tokens", "i8"),
        ("num_tokens", "i8"),
        ("num_prompt_tokens", "i8"),
        ("banned", "i8"),
        ("num_banned", "i8"),
        ("bias_ids", "i8"),
        ("biases", "i8"),
        ("num_biases", "i8"),
        ("mask", "i8"),
        ("logits_row", "i8"),
        ("known", "i8"),
        ("wants_logprob", "i8"),
        ("num_top", "i8"),
        ("finite", "i8"),
        ("token", "i8"),
        ("rank", "i8"),
        ("num_found", "i8"),
        ("logprob", "f8"),
        ("top", "i8"),
        ("top_logprobs", "i8"),
    ]
)


class Jobs(NamedTuple):
    """`length` jobs laid out as SAMPLE_JOB in `memory`, which begins at `address`; results are filled in."""

    memory: object
    address: int
    length: int


NO_JOBS = Jobs(None, 0, 0)


class Drawing(NamedTuple):
    """What another unit calls to have tokens drawn: the address of `llmc_draw`, an engine, and its fields."""

    call: int
    engine: int
    fields: array[int]


class StepInputs(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What changes from step to step, in one array: input ids and positions of each of `num_tokens` tokens,
    the `num_rows` tokens whose logits are wanted, where the queries of `num_sequences` sequences start and
    end; then of each cache group a block table, `widths[g]` pages a sequence, and the slots of the tokens.
    `offsets` are where these begin, in this order. Logits go to the address `logits`, float32 `[num_rows,
    vocab]`, and what is made of them to `jobs`.
    """

    values: array[int]
    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    num_tokens: int
    num_rows: int
    num_sequences: int
    logits: int
    jobs: Jobs = NO_JOBS


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
        bound = [*num_pages, *(_address(k) for k, _ in caches), *(_address(v) for _, v in caches)]
        bound += [_address(weight) for weight in weights] or [0]
        scratch = aligned_empty(self._library.llmc_scratch_bytes(num_threads))
        bound += [_address(arena), _address(scratch)]
        sample_scratch = aligned_zeros(self._library.llmc_sample_scratch_bytes(num_threads))
        # Sizes, four arrays, and of each group its table, its slots and the table's width; then what is bound
        # here once; last the logits, the jobs, the rounds and what is drawn behind the step.
        self._num_groups = len(num_pages)
        self._num_first = 9 + 3 * len(num_pages)
        fields = [*[0] * self._num_first, *bound, 0, 0, 0, _address(sample_scratch), 0, 0, 0, 0]
        self._fields = array("q", fields)
        self._first, self._jobs, self._rounds = Struct(f"={self._num_first}q"), Struct("=3q"), Struct("=4q")
        self._ahead = 0
        self._pointer = (ctypes.c_int64 * len(fields)).from_buffer(self._fields)
        self._alive = (caches, weights, arena, scratch, sample_scratch)
        self._engine: int | None = self._library.llmc_open(num_threads)
        if self._engine is None:
            raise TargetError(
                "cpu.no_threads",
                f"The engine's {num_threads} threads could not be started.",
                "The system refused them: a limit on processes or memory is reached.",
                "Ask for fewer threads, or raise the limit (`ulimit -u`).",
            )

    def step(self, inputs: StepInputs, rounds: int = 1) -> array[int]:
        """Run one step; the logits and the results of `inputs.jobs` are filled.

        With more than one round, each sequence's job draws a token that is its only one in the next round:
        gives the tokens `[rounds, sequences]`, -1 from where a sequence's logits were not finite. None with
        one round: its jobs have them.
        Raises InternalError for ids, positions, pages or rows that generated code would not survive.
        """
        if self._engine is None:
            raise InternalError(
                "runtime.cpu_closed",
                "A step was asked of a closed engine.",
                "Its threads have ended.",
                "Report this with the runtime settings that led to it.",
            )
        num_sequences, groups = inputs.num_sequences, self._num_groups
        base = inputs.values.buffer_info()[0]
        addresses = [base + 8 * offset for offset in inputs.offsets]
        fields, size = self._fields, 8 * len(self._fields)
        self._first.pack_into(
            fields,
            0,
            inputs.num_tokens,
            inputs.num_rows,
            num_sequences,
            num_sequences + 1,
            self._num_threads,
            *addresses[:4],
            *addresses[4::2],
            *addresses[5::2],
            *inputs.widths,
        )
        self._jobs.pack_into(fields, size - 64, inputs.logits, inputs.jobs.address, inputs.jobs.length)
        drawn = array("q", bytes(8 * rounds * num_sequences if rounds > 1 else 0))
        memory = array("q", bytes(8 * ((4 + groups) * num_sequences + 1) if rounds > 1 else 0))
        ahead, self._ahead = self._ahead, 0
        addresses = drawn.buffer_info()[0], memory.buffer_info()[0]
        self._rounds.pack_into(fields, size - 32, rounds, *addresses, ahead)
        fault = self._library.llmc_step(self._engine, self._pointer, len(fields))
        if fault:
            self.refuse(fault)
        return drawn

    def follow(self, ahead: int) -> None:
        """The next step has drafts drawn behind it, as the `DraftAhead` at this address says (0: none)."""
        self._ahead = ahead

    def finish(self, is_wanted: bool) -> bool:
        """Returns when no drafts are drawn ahead any more: whether they were, behind the last step. Those
        that no thread has begun are drawn now if they are wanted, and else never."""
        self._ahead = 0
        return self._engine is not None and self._library.llmc_finish(self._engine, is_wanted) != 0

    def drawing(self, tables: Sequence[int], widths: Sequence[int], tail: Sequence[int]) -> Drawing:
        """Steps of one sequence whose tokens another unit's step gives, with block tables at these addresses;
        `tail` is the address of the logits, of its one job, the rounds, and where their tokens and the memory
        they need begin."""
        assert self._engine is not None
        fields = self._fields[:]
        logits, job, rounds, drawn, memory = tail
        first = [0, 0, 0, 0, self._num_threads, 0, 0, 0, 0, *tables, *[0] * self._num_groups, *widths]
        self._first.pack_into(fields, 0, *first)
        size = 8 * len(fields)
        self._jobs.pack_into(fields, size - 64, logits, job, 1)
        self._rounds.pack_into(fields, size - 32, rounds, drawn, memory, 0)
        call = ctypes.cast(self._library.llmc_draw, ctypes.c_void_p).value
        assert call is not None
        return Drawing(call, self._engine, fields)

    def refuse(self, fault: int) -> None:
        """Says why generated code did nothing."""
        if fault == 1:
            raise ArtifactError(
                "artifact.cpu_fields",
                "The generated code does not fit its description.",
                f"It expects another number of inputs than the {len(self._fields)} it was given.",
                "Compile the model again.",
            )
        raise InternalError(
            "runtime.cpu_step",
            "The generated code refused a step.",
            f"Nothing was computed: {_FAULTS[fault]}.",
            "Report this with the request mix that led to it.",
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
        library.llmc_sample_scratch_bytes.restype = ctypes.c_int64
        library.llmc_sample_scratch_bytes.argtypes = [ctypes.c_int32]
        library.llmc_open.restype = ctypes.c_void_p
        library.llmc_open.argtypes = [ctypes.c_int32]
        library.llmc_close.argtypes = [ctypes.c_void_p]
        library.llmc_step.restype = ctypes.c_int32
        library.llmc_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64]
        library.llmc_finish.restype = ctypes.c_int32
        library.llmc_finish.argtypes = [ctypes.c_void_p, ctypes.c_int32]


def _address(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def aligned_zeros(num_bytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Zeros at an aligned address; the system gives a page when it is first touched."""
    raw = np.zeros(num_bytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes]


def aligned_empty(num_bytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Uninitialised bytes at an aligned address."""
    raw = np.empty(num_bytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes]
