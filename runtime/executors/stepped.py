"""An executor over a model that runs one step at a time: rows, tickets, sampling with the oracle sampler.
Knows the executor protocol; what a step computes is the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...spec.errors import InternalError
from ..protocol import BlockCopy, Drafts, ExecutorCaps, RowDiff, Segment, StepPlan, StepResult, Ticket
from .rows import Row, SegmentOutput
from .tiles import SequencePart, TileLogits


class StepModel(Protocol):
    """What computes: a program with its weights and caches. A token's logits depend on its own sequence
    alone, to the bit."""

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Computes one step, writing K and V of every token; yields the wanted logits as they come."""
        ...

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copies physical pages within their groups, in order."""
        ...

    def close(self) -> None:
        """Releases everything. Idempotent."""
        ...


class SteppedExecutor:
    """`runtime.protocol.Executor` over a `StepModel`. The work of a step is done in `submit`."""

    def __init__(self, model: StepModel, caps: ExecutorCaps) -> None:
        self._model = model
        self._caps = caps
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
            f"The {self._caps.name} executor was asked for drafts.",
            "It has no draft model, and says so in its capabilities.",
            "Report this with the runtime settings that led to it.",
        )

    def close(self) -> None:
        if self._is_open:
            self._model.close()
        self._is_open = False
        self._rows.clear()
        self._done.clear()

    def _run(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Computes all tokens of a step; each segment keeps of its logits what it needs."""
        outputs = [SegmentOutput(segment, self._row(segment.row)) for segment in segments]
        sequences = [
            SequencePart(
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


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InternalError(
            "runtime.step_contract",
            "The engine asked the executor for something that makes no sense.",
            f"The contract between the two was broken: {what}.",
            "Report this with the request mix that led to it.",
        )
