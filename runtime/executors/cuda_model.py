"""A paged program on a device: its operators by launches, the rest by torch, one step at a time. Knows
tensors and steps; nothing of requests and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, fx

from ...ir import ops
from ...ir.interpret import interpret
from ...ir.paged import allocate_caches, k_cache_name, step_inputs, v_cache_name
from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.operators import CudaOperators
from ...kernels.cuda.substitution import substitute
from ...spec.cache import CacheLayout
from ..protocol import BlockCopy
from .reference_model import without_head
from .tiles import SequencePart, TileLogits, split_tiles

assert ops  # importing it registers the operators


class CudaModel:
    """Runs steps of one program over its own caches, in tiles of at most `max_tokens` tokens. Not
    thread-safe.

    `weight(name)` gives tensors on `device` that stay alive as long as the model.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weight: Callable[[str], Tensor],
        layout: CacheLayout,
        num_pages: Sequence[int],
        *,
        launcher: Launcher,
        device: str,
        max_tokens: int,
    ) -> None:
        self._layout = layout
        self._weight = weight
        self._device = device
        self._max_tokens = max_tokens
        caches = allocate_caches(layout, num_pages)
        self._caches = {name: cache.to(device) for name, cache in caches.items()}
        self._whole = substitute(graph, CudaOperators(launcher))
        self._body = without_head(self._whole)

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Runs one step, writing K and V of every token; yields the logits that `wanted` of each sequence
        asks for as they come."""
        for tile in split_tiles(sequences, self._max_tokens):
            parts = [part for _, _, part in tile]
            owners = tuple((index, offset + token) for index, offset, part in tile for token in part.wanted)
            inputs = {
                name: value.to(self._device) for name, value in step_inputs(self._layout, parts).items()
            }
            logits = interpret(self._whole if owners else self._body, inputs | self._caches, self._weight)
            if owners:
                yield TileLogits(owners=owners, logits=logits.float().cpu().numpy())

    def close(self) -> None:
        """Give the caches back. Idempotent."""
        self._caches.clear()

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copies physical pages within their groups, in order."""
        for copy in copies:
            for layer in self._layout.groups[copy.group].layers:
                for name in (k_cache_name(layer), v_cache_name(layer)):
                    self._caches[name][copy.target] = self._caches[name][copy.source]
