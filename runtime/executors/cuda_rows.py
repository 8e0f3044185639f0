"""The permanent rows of requests on a device: who enters, and which pages they hold. The CPU keeps a mirror
of what it may know; tokens that are still being sampled are -1 there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.cuda import row_state
from ...kernels.cuda.sampler import DeviceSampler, make_tables
from ...spec.cache import CacheLayout
from ..protocol import BlockChange, RowEntry, SamplingState
from .cuda_device import Device
from .rows import Row

UNKNOWN = -1


class DeviceRows:
    """Rows 0 … `num_rows - 1`, of sequences of at most `max_length` tokens."""

    def __init__(
        self,
        device: Device,
        sampler: DeviceSampler,
        layout: CacheLayout,
        *,
        num_rows: int,
        vocab_size: int,
        max_length: int,
    ) -> None:
        self._device = device
        self._sampler = sampler
        self._layout = layout
        pages = tuple(group.pages_for(max_length) for group in layout.groups)
        self.tables = make_tables(device.zeros, num_rows, vocab_size, pages)
        self.rows: dict[int, Row] = {}

    def leave(self, rows: Sequence[int]) -> None:
        """Forget rows; steps that are enqueued already still see them."""
        for row in rows:
            self.rows.pop(row, None)

    def enter(self, entry: RowEntry) -> None:
        """A request takes a row."""
        self.rows[entry.row] = Row(entry, self._layout)
        sampling, tables = entry.sampling, self.tables
        uses = _uses(sampling)
        self._write(tables.state, entry.row, np.asarray(_record(entry, uses), np.int64))
        vocab_size = tables.counts.shape[1]
        if uses & row_state.USES_COUNTS:
            self._write(tables.counts, entry.row, _occurrences(entry, vocab_size))
        if uses & row_state.USES_BIAS:
            biases = np.zeros(vocab_size, np.float32)
            for token_id, bias in sampling.logit_bias:
                biases[token_id] += np.float32(bias)
            self._write(tables.bias, entry.row, biases)
        if uses & row_state.USES_BANNED:
            self._write(tables.banned, entry.row, _bits(sampling.banned_until_min, vocab_size))

    def change(self, changes: Sequence[BlockChange]) -> None:
        """Block tables change, here and on the device, once what is enqueued there has read them."""
        latest: list[dict[tuple[int, int], int]] = [{} for _ in self._layout.groups]
        for change in changes:
            self.rows[change.row].set_page(change.group, change.index, change.block)
            latest[change.group][change.row, change.index] = change.block
        for entries, table in zip(latest, self.tables.tables, strict=True):
            if entries:
                packed = [(row, index, block) for (row, index), block in entries.items()]
                self._sampler.change_pages(self._device.sent(np.asarray(packed, np.int32)), table)

    def _write(self, table: torch.Tensor, row: int, values: np.ndarray) -> None:
        self._device.put(values, table[row])


def _uses(sampling: SamplingState) -> int:
    uses = row_state.USES_BIAS if sampling.logit_bias else 0
    if sampling.min_tokens and sampling.banned_until_min:
        uses |= row_state.USES_BANNED
    penalties = (sampling.repetition_penalty != 1.0, sampling.presence_penalty, sampling.frequency_penalty)
    return uses | (row_state.USES_COUNTS if any(penalties) else 0)


def _record(entry: RowEntry, uses: int) -> list[int]:
    sampling = entry.sampling
    integers = {
        row_state.LENGTH: len(entry.token_ids),
        row_state.LAST_TOKEN: entry.token_ids[-1],
        row_state.NUM_PROMPT: entry.num_prompt_tokens,
        row_state.MIN_TOKENS: sampling.min_tokens,
        row_state.TOP_K: sampling.top_k,
        row_state.SEED: sampling.seed,
        row_state.USES: uses,
    }
    floats = {
        row_state.TEMPERATURE: sampling.temperature,
        row_state.REPETITION: sampling.repetition_penalty,
        row_state.PRESENCE: sampling.presence_penalty,
        row_state.FREQUENCY: sampling.frequency_penalty,
        row_state.MIN_P: sampling.min_p,
        row_state.TOP_P: sampling.top_p,
    }
    return row_state.row_record(integers, floats)


def _occurrences(entry: RowEntry, vocab_size: int) -> np.ndarray:
    """Twice how often each token was generated, and one more where the prompt has it."""
    ids = np.asarray(entry.token_ids)
    prompt, generated = ids[: entry.num_prompt_tokens], ids[entry.num_prompt_tokens :]
    counts = 2 * np.bincount(generated.astype(np.int64), minlength=vocab_size)
    counts[prompt] += 1 - (counts[prompt] & 1)
    return counts.astype(np.int32)


def _bits(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
