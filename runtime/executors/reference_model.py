"""A paged program with its weights and caches, run in tiles of a fixed number of rows. Knows tensors and
steps; nothing of requests and sampling.

Why tiles: the bits of a library's result may depend on the shape it is called with, and a token's must not
depend on its company. Here every operator of the graph is always called with exactly `TILE` tokens, and
outside of matrix products on one thread, since a vectorised loop that several threads cut in
the middle of a row treats the ends differently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from ...ir import ops
from ...ir.interpret import interpret
from ...ir.paged import allocate_caches, cache_names, slots_name, step_inputs
from ...spec.cache import CacheLayout
from ..protocol import BlockCopy
from .reference_products import Products
from .tiles import SequencePart, TileLogits, split_tiles

assert ops  # importing it registers the operators

TILE = 32


class ReferenceModel:
    """Runs steps of one program over its own caches. Not thread-safe.

    `weight(name)` gives tensors that stay alive as long as the model where `products` keeps anything.
    """

    def __init__(
        self,
        graph: fx.Graph,
        weight: Callable[[str], Tensor],
        layout: CacheLayout,
        num_pages: Sequence[int],
        products: Products,
    ) -> None:
        self._layout = layout
        self._weight = weight
        self._caches = allocate_caches(layout, num_pages)
        self._whole = products.substitute(graph)
        self._body = without_head(self._whole)

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Runs one step tile by tile, in order, writing K and V of every token; yields the logits that
        `wanted` of each sequence asks for as they come."""
        for tile in split_tiles(sequences, TILE):
            parts = [part for _, _, part in tile]
            owners = tuple((index, offset + token) for index, offset, part in tile for token in part.wanted)
            inputs = _padded(step_inputs(self._layout, parts), len(self._layout.groups)) | self._caches
            with self._single_threaded():
                logits = interpret(self._whole if owners else self._body, inputs, self._weight)
            if owners:
                yield TileLogits(owners=owners, logits=logits[: len(owners)].float().numpy())

    def close(self) -> None:
        """Nothing is held that outlives the model."""

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copies physical pages within their groups, in order."""
        for copy in copies:
            for layer in self._layout.groups[copy.group].layers:
                for name in cache_names(self._layout.groups[copy.group], layer):
                    self._caches[name][copy.target] = self._caches[name][copy.source]

    @contextmanager
    def _single_threaded(self) -> Generator[None, None, None]:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def without_head(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` without what depends on `out_rows`: it writes the caches and returns nothing."""
    headed: set[fx.Node] = set()
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        is_head = node.op == "output" or (node.op == "placeholder" and node.target == "out_rows")
        if is_head or any(source in headed for source in node.all_input_nodes):
            headed.add(node)
        else:
            copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(())
    return body


def _padded(inputs: dict[str, Tensor], num_groups: int) -> dict[str, Tensor]:
    """`inputs` filled up to `TILE` tokens and rows: what is added writes nothing and attends to nothing."""
    fill = {"input_ids": 0, "positions": 0, "out_rows": 0}
    fill |= {slots_name(group): -1 for group in range(num_groups)}
    padded = dict(inputs)
    for name, value in fill.items():
        missing = TILE - inputs[name].shape[0]
        padded[name] = torch.nn.functional.pad(inputs[name], (0, missing), value=value)
    return padded
