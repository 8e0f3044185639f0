"""The reference executor: interprets the program with torch, one step at a time. Slow, and obviously
right: what every other executor is measured against."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...artifact.reader import Artifact
from ...artifact.schema import PROGRAM
from ...ir.document import decode_program
from ...ir.paged import paged_inputs
from ...ir.program import Program
from ...ir.weights import Source, WeightStore
from ...spec.cache import CacheLayout
from ...spec.errors import ArtifactError, InternalError
from ...spec.model import ModelSpec
from ..config import RuntimeConfig
from ..memory import available_memory_bytes
from ..page_budget import demand_of, num_pages
from ..protocol import ExecutorCaps
from .reference_model import ReferenceModel
from .reference_products import Products
from .stepped import OracleSampled, SteppedExecutor

# Dequantised weights are kept while they take no more than this share of the memory that is available.
_DENSE_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSource:
    """What the executor runs, wherever it comes from: a stored artifact or a program in memory."""

    graph: fx.Graph
    weight: Callable[[str], Tensor]
    spec: ModelSpec
    cache: CacheLayout


def open_executor(artifact: Artifact, config: RuntimeConfig) -> SteppedExecutor:
    """The executor of an artifact of target kind `reference`; its weights stay mapped files."""
    return make_executor(source_of_artifact(artifact), config)


def source_of_artifact(artifact: Artifact) -> ReferenceSource:
    """Program and weights of `artifact`. Raises ArtifactError when they do not fit together."""
    document = decode_program(artifact.read_bytes(PROGRAM))
    layout = artifact.manifest.cache
    if document.inputs != paged_inputs(layout):
        raise _unfit("its inputs are not those of its cache layout")
    entries = {
        name: Source(str(artifact.path / file), name, view.shape, _torch_dtype(view.dtype))
        for file, views in artifact.weight_files()
        for name, view in views.items()
    }
    names = [str(node.target) for node in document.graph.nodes if node.op == "get_attr"]
    missing = [name for name in names if name not in entries]
    if missing:
        raise _unfit(f"it reads the weight {missing[0]!r}, which is not stored")
    store = WeightStore(entries)
    weights = {name: store.evaluate(name) for name in names}
    return ReferenceSource(
        graph=document.graph,
        weight=weights.__getitem__,
        spec=artifact.manifest.spec,
        cache=layout,
    )


def source_of_program(program: Program) -> ReferenceSource:
    """A program after the lay-out stage; weights that take much memory together are read as they are used."""
    if program.cache is None:
        raise InternalError(
            "runtime.no_cache_layout",
            "The program cannot be executed.",
            "It has no cache layout: the lay-out stage has not run.",
            "Run the recipe's kv_layout and paged_attention passes first.",
        )
    return ReferenceSource(
        graph=program.graph, weight=program.weights.fetcher(), spec=program.spec, cache=program.cache
    )


def make_executor(
    source: ReferenceSource, config: RuntimeConfig, *, dense_bytes: int | None = None
) -> SteppedExecutor:
    """An executor over torch. `dense_bytes` bounds the memory for dequantised weights (None: half of what
    is available)."""
    max_context = source.spec.max_context
    demand = demand_of(config, max_context)
    available = available_memory_bytes()
    pages = num_pages(source.cache, demand, config.cache_bytes, available)
    threads = config.num_threads or os.cpu_count() or 1
    kept_bytes = int(available * _DENSE_SHARE) if dense_bytes is None else dense_bytes
    products = Products(threads, kept_bytes)
    model = ReferenceModel(source.graph, source.weight, source.cache, pages, products)
    caps = ExecutorCaps(
        name="reference",
        vocab_size=source.spec.vocab_size,
        max_context=max_context,
        max_rows=config.max_requests,
        max_tokens=config.max_step_tokens,
        max_in_flight=1,
        cache=source.cache,
        num_blocks=pages,
        details={"dtype": source.spec.compute_dtype, "threads": str(threads)},
    )
    return SteppedExecutor(OracleSampled(model), caps)


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _unfit(why: str) -> ArtifactError:
    return ArtifactError(
        "artifact.program",
        "The stored program cannot be run.",
        f"Program, manifest and weights do not belong together: {why}.",
        "Compile the model again.",
    )
