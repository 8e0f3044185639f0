"""The reference executor: interprets the program with torch and samples with the oracle sampler, one step
at a time. Slow, and obviously right: what every other executor is measured against."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...artifact.reader import Artifact
from ...artifact.schema import PROGRAM
from ...ir.document import decode_program
from ...ir.paged import PagedSequence, paged_inputs
from ...ir.program import Program
from ...ir.weights import Source, WeightStore
from ...spec.cache import CacheLayout
from ...spec.errors import ArtifactError, InternalError
from ...spec.model import ModelSpec
from ..config import RuntimeConfig
from ..memory import available_memory_bytes
from ..page_budget import CacheDemand, num_pages
from ..protocol import Drafts, ExecutorCaps, RowDiff, Segment, StepPlan, StepResult, Ticket
from .reference_model import ReferenceModel
from .reference_products import Products
from .reference_rows import Row, SegmentOutput

# Dequantised weights are kept while they take no more than this share of the memory that is available.
_DENSE_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSource:
    """What the executor runs, wherever it comes from: a stored artifact or a program in memory."""

    graph: fx.Graph
    weight: Callable[[str], Tensor]
    spec: ModelSpec
    cache: CacheLayout


def open_executor(artifact: Artifact, config: RuntimeConfig) -> ReferenceExecutor:
    """The executor of an artifact of target kind `reference`; its weights stay mapped files."""
    return ReferenceExecutor(source_of_artifact(artifact), config)


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
    """A program after the lay-out stage, with all of its weights evaluated into memory."""
    if program.cache is None:
        raise InternalError(
            "runtime.no_cache_layout",
            "The program cannot be executed.",
            "It has no cache layout: the lay-out stage has not run.",
            "Run the recipe's kv_layout and paged_attention passes first.",
        )
    weights = {name: program.weights.evaluate(name) for name in program.used_weights()}
    return ReferenceSource(
        graph=program.graph, weight=weights.__getitem__, spec=program.spec, cache=program.cache
    )


class ReferenceExecutor:
    """`runtime.protocol.Executor` over torch. The work of a step is done in `submit`.

    `dense_bytes` bounds the memory for dequantised weights (None: half of what is available).
    """

    def __init__(
        self, source: ReferenceSource, config: RuntimeConfig, *, dense_bytes: int | None = None
    ) -> None:
        max_context = source.spec.max_context
        demand = CacheDemand(
            max_requests=config.max_requests,
            max_model_len=min(config.max_model_len or max_context, max_context),
            max_step_tokens=config.max_step_tokens,
        )
        available = available_memory_bytes()
        pages = num_pages(source.cache, demand, config.cache_bytes, available)
        threads = config.num_threads or os.cpu_count() or 1
        kept_bytes = int(available * _DENSE_SHARE) if dense_bytes is None else dense_bytes
        products = Products(threads, kept_bytes)
        self._model = ReferenceModel(source.graph, source.weight, source.cache, pages, products)
        self._caps = ExecutorCaps(
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
        self._rows: dict[int, Row] = {}
        self._done: dict[Ticket, StepResult] = {}
        self._num_tickets = 0
        self._is_open = True

    @property
    def caps(self) -> ExecutorCaps:
        return self._caps

    def apply(self, diff: RowDiff) -> None:
        for row in diff.leave:
            self._rows.pop(row, None)
        for entry in diff.enter:
            _expect(entry.row not in self._rows, f"row {entry.row} is taken")
            self._rows[entry.row] = Row(entry, self._caps.cache)

    def submit(self, plan: StepPlan) -> Ticket:
        _expect(self._is_open, "the executor was closed")
        _expect(not self._done, "the last step was not collected")
        _expect(plan.num_tokens <= self._caps.max_tokens, f"{plan.num_tokens} tokens are too many for a step")
        for change in plan.block_changes:
            self._row(change.row).set_page(change.group, change.index, change.block)
        self._model.copy_pages(plan.block_copies)
        outputs = self._run(plan.segments)
        masks = _split_masks(plan)
        results = tuple(output.result(mask) for output, mask in zip(outputs, masks, strict=True))
        for segment, result in zip(plan.segments, results, strict=True):
            self._rows[segment.row].token_ids.extend(result.token_ids)
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets)
        self._done[ticket] = StepResult(step_id=plan.step_id, epoch=plan.epoch, rows=results)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        _expect(ticket in self._done, f"there is no step {ticket} to collect")
        return self._done.pop(ticket)

    def propose(self, rows: Sequence[int], k: int) -> Drafts:
        raise InternalError(
            "runtime.no_draft_model",
            "The reference executor was asked for drafts.",
            "It has no draft model, and says so in its capabilities.",
            "Report this with the runtime settings that led to it.",
        )

    def close(self) -> None:
        self._is_open = False
        self._rows.clear()
        self._done.clear()

    def _run(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Computes all tokens of a step; each segment keeps of its logits what it needs."""
        outputs = [SegmentOutput(segment, self._row(segment.row)) for segment in segments]
        sequences = [
            PagedSequence(
                start=output.segment.start,
                token_ids=output.token_ids,
                block_tables=output.row.tables,
                wanted=output.wanted,
            )
            for output in outputs
        ]
        for tile in self._model.run(sequences):
            for (index, token), logits in zip(tile.owners, tile.logits, strict=True):
                outputs[index].take(token, logits)
        return outputs

    def _row(self, row: int) -> Row:
        _expect(row in self._rows, f"row {row} is empty")
        return self._rows[row]


def _split_masks(plan: StepPlan) -> list[NDArray[np.uint32] | None]:
    """The mask rows of each segment."""
    if plan.grammar_mask is None:
        return [None] * len(plan.segments)
    sizes = [1 + len(segment.draft_ids) for segment in plan.segments]
    _expect(len(plan.grammar_mask) == sum(sizes), "the grammar mask has another number of rows than samples")
    return list(np.split(plan.grammar_mask, np.cumsum(sizes)[:-1]))


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InternalError(
            "runtime.step_contract",
            "The engine asked the executor for something that makes no sense.",
            f"The contract between the two was broken: {what}.",
            "Report this with the request mix that led to it.",
        )


def _unfit(why: str) -> ArtifactError:
    return ArtifactError(
        "artifact.program",
        "The stored program cannot be run.",
        f"Program, manifest and weights do not belong together: {why}.",
        "Compile the model again.",
    )
