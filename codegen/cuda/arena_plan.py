"""Where each tensor of a captured step lies: found by walking the step over tensors without data, and
watching which of them are still held. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...spec.arena import Buffer, arena_bytes, place


class ArenaWalk:
    """Makes the tensors of a walk, as `kernels.cuda.operators.Empty`, and remembers their lives."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._last: list[int | None] = []
        self._storages: list[StorageWeakRef] = []

    def empty(self, like: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """A tensor of no plan, whose life is noted."""
        self._note_deaths()
        tensor: Tensor = like.new_empty(shape, dtype=dtype or like.dtype)
        self._sizes.append(math.prod(shape) * tensor.element_size())
        self._last.append(None)
        self._storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def offsets(self) -> tuple[int, ...]:
        """Where each tensor lies, in the order in which they were made; of those that are not dead yet, as
        long as the walk goes on, nobody else's bytes."""
        slots = {slot.value: slot.offset_bytes for slot in place(self._buffers())}
        return tuple(slots.get(str(index), 0) for index in range(len(self._sizes)))

    @property
    def bytes(self) -> int:
        """What all of them need."""
        return arena_bytes(place(self._buffers()))

    def _buffers(self) -> Sequence[Buffer]:
        end = len(self._sizes)
        return [
            Buffer(value=str(index), size_bytes=size, first=index, last=end if last is None else last)
            for index, (size, last) in enumerate(zip(self._sizes, self._last, strict=True))
            if size
        ]

    def _note_deaths(self) -> None:
        """What died since the last tensor was made: its bytes are free for the next."""
        for index, storage in enumerate(self._storages):
            if self._last[index] is None and storage.expired():
                self._last[index] = len(self._sizes) - 1
