"""A paged program on a device: its operators by launches, the rest by torch, one step at a time. Knows
tensors and steps; nothing of requests and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, fx

from ...ir import ops
from ...ir.interpret import Observer, interpret
from ...ir.paged import SequenceLike, allocate_caches, cache_names, step_inputs
from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.operators import CudaOperators
from ...kernels.cuda.products import ARRIVALS, Empty
from ...kernels.cuda.substitution import substitute
from ...kernels.cuda.variants import Choose, modelled
from ...spec.cache import CacheLayout
from ..protocol import BlockCopy
from .cuda_device import Device
from .reference_model import without_head
from .tiles import SequencePart, TileLogits, split_tiles

assert ops  # importing it registers the operators


class CudaModel:
    """Runs steps of one program over its own caches, in tiles of at most `max_tokens` tokens. Not
    thread-safe.

    `weight(name)` gives tensors on `device` that stay alive as long as the model. `choose` and
    `invariant` are as in `CudaOperators`.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weight: Callable[[str], Tensor],
        layout: CacheLayout,
        num_pages: Sequence[int],
        *,
        launcher: Launcher,
        device: Device,
        max_tokens: int,
        choose: Choose = modelled,
        invariant: bool = True,
    ) -> None:
        self._launcher, self._choose, self._invariant = launcher, choose, invariant
        self._arrived = device.zeros((ARRIVALS,), "int32")
        self._layout = layout
        self._weight = weight
        self._device = device
        self._max_tokens = max_tokens
        caches = allocate_caches(layout, num_pages)
        self._caches = {name: cache.to(device.name) for name, cache in caches.items()}
        self._graph = graph
        self._whole = substitute(graph, self.operators())
        self._body = without_head(self._whole)

    def operators(self, empty: Empty | None = None) -> CudaOperators:
        """Those of the model, their tensors made by `empty`, else by torch. Steps that use them follow each
        other."""
        own = CudaOperators(
            self._launcher, arrived=self._arrived, choose=self._choose, invariant=self._invariant
        )
        return own if empty is None else replace(own, empty=empty)

    @property
    def layout(self) -> CacheLayout:
        """Of the caches."""
        return self._layout

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Runs one step, writing K and V of every token; yields the logits that `wanted` of each sequence
        asks for as they come."""
        for tile in split_tiles(sequences, self._max_tokens):
            parts = [part for _, _, part in tile]
            owners = tuple((index, offset + token) for index, offset, part in tile for token in part.wanted)
            with self._device.scope():
                logits = self.forward(parts, lambda ids: None)
                values = None if logits is None else logits.float().cpu().numpy()
            if values is not None:
                yield TileLogits(owners=owners, logits=values)

    def forward(
        self,
        parts: Sequence[SequenceLike],
        fill: Callable[[Tensor], None],
        observe: Observer | None = None,
    ) -> Tensor | None:
        """Enqueues one step of at most `max_tokens` tokens; the wanted logits on the device, None where none
        are. `fill` may change the ids, which are there already; `observe` sees every value between two
        launches."""
        inputs = {
            name: value.to(self._device.name) for name, value in step_inputs(self._layout, parts).items()
        }
        fill(inputs["input_ids"])
        has_head = any(part.wanted for part in parts)
        logits = self.compute(self._whole if has_head else self._body, inputs, observe)
        return logits if has_head else None

    def graph_by(self, operators: CudaOperators) -> fx.Graph:
        """The program, for `compute`, carried out by `operators`."""
        return substitute(self._graph, operators)

    def compute(
        self, graph: fx.Graph, inputs: Mapping[str, Tensor], observe: Observer | None = None
    ) -> Tensor:
        """Enqueues `graph`, which may be a part of the model's; `observe` sees every value."""
        return interpret(graph, {**inputs, **self._caches}, self._weight, observe)

    def close(self) -> None:
        """Give the caches back. Idempotent."""
        self._caches.clear()

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copies physical pages within their groups, in order."""
        with self._device.scope():
            self._copy_pages(copies)

    def _copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            group = self._layout.groups[copy.group]
            for layer in group.layers:
                for name in cache_names(group, layer):
                    self._caches[name][copy.target] = self._caches[name][copy.source]
