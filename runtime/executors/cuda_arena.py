"""Device memory that steps compute in, one after another, every tensor where a plan puts it. Knows nothing of
what is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...spec.errors import InternalError


class Arena:
    """Tensors in a buffer of bytes, the n-th of them at `offsets[n]`. One arena is for one capture: the next
    may use the same buffer, because steps run one after another."""

    def __init__(self, buffer: Tensor, offsets: Sequence[int]) -> None:
        self._buffer = buffer
        self._offsets = iter(offsets)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """`kernels.cuda.operators.Empty`. Raises InternalError where the plan has no such place."""
        kind: torch.dtype = dtype or like.dtype
        size = math.prod(shape) * kind.itemsize
        offset = next(self._offsets, None)
        if offset is None or offset + size > self._buffer.numel():
            raise InternalError(
                "cuda.arena",
                "A captured step needs memory that was not planned for it.",
                f"{size} bytes at {offset} do not lie within the {self._buffer.numel()} of the arena.",
                "Report this with the model and the batch sizes.",
            )
        return self._buffer[offset : offset + size].view(kind).view(shape)


class StepMemory:
    """One piece of memory for steps, as large as the largest so far needed. What it was before is free again
    once the steps that were enqueued with it are done, if all are on one stream."""

    def __init__(self, device: str) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, num_bytes: int) -> Tensor:
        """At least `num_bytes` of it, a multiple of 16."""
        if num_bytes > self._buffer.numel():
            self._buffer = self._buffer.new_empty(0)  # both at once may be too much
            self._buffer = self._buffer.new_empty(-(-num_bytes // 16) * 16)
        return self._buffer
