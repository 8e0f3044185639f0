"""Sampling a launched step by a list, as its model's launches are. Knows which tensors sampling takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.sampler import DeviceSampler, RowTables, Samples, SampleSpace
from .cuda_model import CudaModel

_SAMPLES = ("row_of", "ahead", "drafts", "mask_of", "masks", "first", "count")
_INPUTS = ("logits", *_SAMPLES, "results")
_SPACE = ("shaped", "best", "place", "bad", "score", "drawn", "keys", "sums", "bins")
_TABLES = ("state", "counts", "bias", "banned")


class ListedSampler:
    """`kernels.cuda.sampler.DeviceSampler.sample` over `tables`, in `space`, by lists of `model`, which has
    them."""

    def __init__(self, model: CudaModel, tables: RowTables, space: SampleSpace) -> None:
        held = {name: getattr(space, name) for name in _SPACE}
        held |= {name: getattr(tables, name) for name in _TABLES}

        def constant(node: fx.Node) -> Tensor | None:
            return held.get(str(node.target))

        self._lists = {
            filtered: model.listed(lambda launcher, f=filtered: _graph(launcher, f), constant)
            for filtered in (False, True)
        }

    def sample(
        self, logits: Tensor, samples: Samples, results: Tensor, stream: int, *, filtered: bool
    ) -> None:
        """As there, on `stream`."""
        inputs: dict[str, Tensor] = {name: getattr(samples, name) for name in _SAMPLES}
        self._lists[filtered].run({**inputs, "logits": logits, "results": results}, stream)


def _graph(launcher: Launcher, filtered: bool) -> fx.Graph:
    """A program of one node, which samples and gives nothing."""
    graph = fx.Graph()
    names = (*_INPUTS, *_SPACE, *_TABLES)
    graph.call_function(_sampling(launcher, filtered), tuple(graph.placeholder(name) for name in names))
    graph.output(())
    return graph


def _sampling(launcher: Launcher, filtered: bool) -> Callable[..., None]:
    def sample(*tensors: Any) -> None:
        given = dict(zip((*_INPUTS, *_SPACE, *_TABLES), tensors, strict=True))
        DeviceSampler(launcher).sample(
            given["logits"],
            Samples(**{name: given[name] for name in _SAMPLES}),
            RowTables(**{name: given[name] for name in _TABLES}, tables=()),
            SampleSpace(**{name: given[name] for name in _SPACE}),
            given["results"],
            filtered=filtered,
        )

    return sample
