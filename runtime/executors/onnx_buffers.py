"""Keys and values of an ONNX model: a buffer a sequence, and a store of pages. Knows arrays, no books."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifact.onnx import OnnxCache
from ...spec.cache import CacheLayout
from .onnx_slots import Move, Place

Array = NDArray[Any]
_LEAST_TOKENS = 256


class SlotBuffers:
    """Per layer `[slots, G, capacity, D]` for keys and for values, and as many pages as the engine may use.

    Capacity doubles as sequences grow, up to `max_tokens`. Memory that was never written takes none: the
    system gives pages of zeros as they are touched.
    """

    def __init__(
        self,
        caches: Sequence[OnnxCache],
        layout: CacheLayout,
        num_pages: Sequence[int],
        num_slots: int,
        max_tokens: int,
    ) -> None:
        self._caches = caches
        self._num_slots = num_slots
        self._max_tokens = max_tokens
        self.capacity = min(_LEAST_TOKENS, max_tokens)
        self._groups = [layout.owner_of(cache.layer)[0] for cache in caches]
        self._page_tokens = [group.page_tokens for group in layout.groups]
        self._store = [
            self._pair(cache, num_pages[group], self._page_tokens[group])
            for cache, group in zip(caches, self._groups, strict=True)
        ]
        self._slots = self._empty(self.capacity)

    def arrays(self) -> list[tuple[Array, Array]]:
        """Keys and values of every cache, `[slots, G, capacity, D]`."""
        return self._slots

    def ensure(self, tokens: int) -> bool:
        """Make room for `tokens` tokens in every slot; whether the arrays are others now."""
        if tokens <= self.capacity:
            return False
        old, before = self.capacity, self._slots
        while self.capacity < tokens:
            self.capacity = min(2 * self.capacity, max(tokens, self._max_tokens))
        self._slots = self._empty(self.capacity)
        for pair, source in zip(self._slots, before, strict=True):
            for new, known in zip(pair, source, strict=True):
                new[:, :, :old] = known
        return True

    def move(self, moves: Iterable[Move]) -> None:
        """Copy pages, in order."""
        for move in moves:
            for index, group in enumerate(self._groups):
                if group == move.group:
                    size = self._page_tokens[group]
                    for kind in (0, 1):
                        source = self._page(index, kind, move.source, size)
                        target = self._page(index, kind, move.target, size)
                        width = min(source.shape[1], target.shape[1])
                        target[:, :width] = source[:, :width]

    def _page(self, index: int, kind: int, place: Place, size: int) -> Array:
        """One page of one cache: `[G, tokens, D]`."""
        if place.slot < 0:
            return self._store[index][kind][place.block]
        return self._slots[index][kind][place.slot, :, place.block * size : (place.block + 1) * size]

    def _empty(self, capacity: int) -> list[tuple[Array, Array]]:
        return [self._pair(cache, self._num_slots, capacity) for cache in self._caches]

    @staticmethod
    def _pair(cache: OnnxCache, count: int, tokens: int) -> tuple[Array, Array]:
        shape = (count, cache.num_kv_heads, tokens)
        keys, values = (np.zeros((*shape, width), np.float32) for width in (cache.k_dim, cache.v_dim))
        return keys, values
