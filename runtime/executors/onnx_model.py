"""An ONNX graph in a session of ONNX Runtime, run one step at a time over the caches of its sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ...artifact.onnx import OnnxUnit
from ...spec.cache import CacheLayout
from ..protocol import BlockCopy
from .onnx_buffers import SlotBuffers
from .onnx_slots import SlotBook
from .tiles import SequencePart, TileLogits

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """One sequence of a step and the slot it was given."""

    index: int
    slot: int
    sequence: SequencePart

    @property
    def stop(self) -> int:
        """Tokens known after the step."""
        return self.sequence.start + len(self.sequence.token_ids)


class OnnxModel:
    """A `stepped.LogitsModel` over the engine graph of an ONNX artifact. Not thread-safe.

    Sequences with one new token run together, all others one by one: the operators take several new tokens
    of one sequence only.
    """

    def __init__(
        self,
        path: Path,
        unit: OnnxUnit,
        layout: CacheLayout,
        num_pages: Sequence[int],
        num_slots: int,
        max_tokens: int,
        vocab_size: int,
        num_threads: int,
    ) -> None:
        self._unit = unit
        self._vocab_size = vocab_size
        self._session = open_session(path, num_threads)
        self._book = SlotBook(num_slots, tuple(group.page_tokens for group in layout.groups))
        # One token more: an idle slot among busy ones writes behind its last.
        self._buffers = SlotBuffers(unit.caches, layout, num_pages, num_slots, max_tokens + 1)
        self._known = [0] * num_slots

    @property
    def providers(self) -> list[str]:
        """Names of the execution providers that the session has, the first one preferred."""
        return self._session.get_providers()

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Run one step, writing K and V of every token; yields the wanted logits as they come."""
        parts = self._place(sequences)
        singles = [part for part in parts if len(part.sequence.token_ids) == 1 and self._unit.in_place]
        if singles:
            yield from self._run_together(singles)
        for part in parts:
            if part not in singles:
                yield from self._run_alone(part)

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copy physical pages within their groups, in order."""
        for copy in copies:
            move = self._book.copy_page(copy.group, copy.source, copy.target)
            if move is not None:
                self._buffers.move([move])

    def close(self) -> None:
        """Nothing is held that outlives the model."""

    def _place(self, sequences: Sequence[SequencePart]) -> list[_Part]:
        self._book.begin_step()
        parts: list[_Part] = []
        for index, sequence in enumerate(sequences):
            stop = sequence.start + len(sequence.token_ids)
            self._buffers.ensure(stop + 1)
            slot, moves = self._book.take(sequence.block_tables, sequence.start, stop)
            self._buffers.move(moves)
            self._known[slot] = stop
            parts.append(_Part(index, slot, sequence))
        return parts

    def _run_together(self, parts: list[_Part]) -> Iterator[TileLogits]:
        """One call over all slots from the first to the last of `parts`. A slot in between computes a token
        that nobody asked for, behind its own last."""
        low, high = min(part.slot for part in parts), max(part.slot for part in parts) + 1
        ids = np.zeros((high - low, 1), np.int64)
        known = np.asarray([count + 1 for count in self._known[low:high]], np.int64)
        for part in parts:
            ids[part.slot - low, 0] = part.sequence.token_ids[0]
            known[part.slot - low] = part.stop
        wanted = [part for part in parts if len(part.sequence.wanted)]
        rows = np.asarray([part.slot - low for part in wanted], np.int64)
        logits = self._call(low, high, ids, known, rows)
        if wanted:
            yield TileLogits(owners=tuple((part.index, 0) for part in wanted), logits=logits)

    def _run_alone(self, part: _Part) -> Iterator[TileLogits]:
        sequence = part.sequence
        ids = np.asarray([sequence.token_ids], np.int64)
        rows = np.asarray(sequence.wanted, np.int64)
        known = np.asarray([part.stop], np.int64)
        call = self._call if self._unit.in_place else self._call_with_past
        logits = call(part.slot, part.slot + 1, ids, known, rows)
        if len(rows):
            owners = tuple((part.index, token) for token in sequence.wanted)
            yield TileLogits(owners=owners, logits=logits)

    def _call(self, low: int, high: int, ids: Array, known: Array, rows: Array) -> Array:
        """Run the graph over the buffers of slots `low` to `high`, in place; logits `[rows, vocab]`."""
        binding = self._bound_inputs(ids, known, rows)
        for cache, pair in zip(self._unit.caches, self._buffers.arrays(), strict=True):
            for kind, array in zip(("key", "value"), pair, strict=True):
                view = array[low:high]
                place = ("cpu", 0, np.float32, view.shape, view.ctypes.data)
                binding.bind_input(f"past_key_values.{cache.layer}.{kind}", *place)
                binding.bind_output(f"present.{cache.layer}.{kind}", *place)
        return self._finish(binding, len(rows))

    def _call_with_past(self, low: int, high: int, ids: Array, known: Array, rows: Array) -> Array:
        """Run the graph on copies of what came before, and keep what it made of them: `[1, G, start, D]` in,
        `[1, G, stop, D]` out."""
        start, stop = int(known[0]) - ids.shape[1], int(known[0])
        binding = self._bound_inputs(ids, known, rows)
        made: list[tuple[Array, Array]] = []
        kept: list[Array] = []
        for cache, pair in zip(self._unit.caches, self._buffers.arrays(), strict=True):
            for kind, array in zip(("key", "value"), pair, strict=True):
                past = np.ascontiguousarray(array[low:high, :, :start])
                present = np.empty((1, array.shape[1], stop, array.shape[3]), np.float32)
                _bind(binding.bind_input, f"past_key_values.{cache.layer}.{kind}", past)
                _bind(binding.bind_output, f"present.{cache.layer}.{kind}", present)
                kept.append(past)
                made.append((array, present))
        logits = self._finish(binding, len(rows))
        for array, present in made:
            array[low, :, start:stop] = present[0, :, start:]
        return logits

    def _bound_inputs(self, ids: Array, known: Array, rows: Array) -> Any:
        total = int(known.max())
        mask = (np.arange(total)[None] < known[:, None]).astype(np.int64)
        binding = self._session.io_binding()
        self._inputs = (ids, mask, rows)  # alive while the step runs
        for name, array in zip(("input_ids", "attention_mask", "out_rows"), self._inputs, strict=True):
            _bind(binding.bind_input, name, array)
        return binding

    def _finish(self, binding: Any, num_rows: int) -> Array:
        logits = np.empty((num_rows, self._vocab_size), np.float32)
        _bind(binding.bind_output, "logits", logits)
        self._session.run_with_iobinding(binding)
        return logits


def _bind(bind: Any, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def open_session(path: Path, num_threads: int) -> Any:
    """A session for the graph at `path`: on the GPU, as far as it has kernels, where the installed ONNX
    Runtime has the CUDA provider and finds a device, else on the CPU."""
    library: Any = onnxruntime
    options = library.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return library.InferenceSession(
        str(path), options, providers=_providers(library.get_available_providers())
    )


def _providers(available: Sequence[str]) -> list[Any]:
    """Products on the GPU keep float32 as it is: its 19-bit form would not hold the oracle."""
    cuda: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    return [*(cuda if "CUDAExecutionProvider" in available else []), "CPUExecutionProvider"]
