"""A paged program on a device: its operators by launches, the rest by torch, one step at a time. Knows
tensors and steps; nothing of requests and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
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
from .cuda_arena import StepMemory
from .cuda_blocks import BlockForms
from .cuda_device import Device
from .cuda_forms import Forms
from .cuda_lists import LaunchLists, Listed, Pack
from .reference_model import without_head
from .tiles import SequencePart, TileLogits, split_tiles

assert ops  # importing it registers the operators


class CudaModel:
    """Runs steps of one program over its own caches, in tiles of at most `max_tokens` tokens. Not
    thread-safe.

    `weight(name)` gives tensors on `device` that stay alive as long as the model. `choose` and
    `invariant` are as in `CudaOperators`. With `pack`, what a step launches is a list that stands ready;
    without, and while `uses_lists` is not set, operators launch one by one: the same launches.
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
        pack: Pack | None = None,
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
        self._pack, self._memory = pack, StepMemory(device.name)
        self._forms = BlockForms(Forms(self.operators()))
        self._lists = {} if pack is None else self._make_lists()
        self.uses_lists = self.has_lists

    def _make_lists(self) -> dict[bool, LaunchLists]:
        """Lists of steps with and without logits."""

        def constant(node: fx.Node) -> Tensor | None:
            if node.op == "get_attr":
                return self._weight(str(node.target))
            return self._caches.get(str(node.target))

        whole = substitute(self._graph, self._forms.forms.operators)
        graphs = {True: (whole, self._whole), False: (without_head(whole), self._body)}
        return {has_head: self._listed(*each, constant) for has_head, each in graphs.items()}

    def _listed(
        self, planned: fx.Graph, graph: fx.Graph, constant: Callable[[fx.Node], Tensor | None]
    ) -> LaunchLists:
        assert self._pack is not None
        listed = Listed(planned, graph, self._forms, constant)
        return LaunchLists(listed, self._arrived, self._pack, self._memory)

    def listed(
        self, make: Callable[[Launcher], fx.Graph], constant: Callable[[fx.Node], Tensor | None]
    ) -> LaunchLists:
        """Lists of a program beside the model's, whose steps follow or precede the model's; `make` gives it
        over a launcher, `constant` the tensors of those of its inputs that stay."""
        return self._listed(make(self._forms.forms.operators.launch), make(self._launcher), constant)

    @property
    def has_lists(self) -> bool:
        """Whether there are lists."""
        return bool(self._lists)

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
        are, which stand until the next step. `fill` may change the ids, which are there already; `observe`
        sees every value between two launches."""
        inputs = self._sent(step_inputs(self._layout, parts))
        fill(inputs["input_ids"])
        has_head = any(part.wanted for part in parts)
        if observe is None and self.uses_lists:
            return self._lists[has_head].run(inputs, self._device.stream)
        logits = self.compute(self._whole if has_head else self._body, inputs, observe)
        return logits if has_head else None

    def _sent(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of a step on the device, by one copy; each begins at a multiple of 16 bytes."""
        ends = list(accumulate(each.numel() + each.numel() % 2 for each in inputs.values()))
        packed = np.zeros(ends[-1], np.int64)
        begins = dict(zip(inputs, [0, *ends], strict=False))
        for name, each in inputs.items():
            packed[begins[name] : begins[name] + each.numel()] = each.numpy().reshape(-1)
        whole = self._device.sent(packed)
        return {
            name: whole[begins[name] : begins[name] + each.numel()].view(each.shape)
            for name, each in inputs.items()
        }

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
        self._lists.clear()
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
