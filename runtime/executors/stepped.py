"""An executor over a model that runs one step at a time: rows and tickets.
Knows the executor protocol; what a step computes and samples is the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...spec.errors import InternalError
from ..protocol import (
    BlockCopy,
    Drafts,
    ExecutorCaps,
    RowDiff,
    RowResult,
    Segment,
    StepPlan,
    StepResult,
    Ticket,
)
from .rows import Row, SegmentOutput
from .tiles import SequencePart, TileLogits

Mask = NDArray[np.uint32]


class StepModel(Protocol):
    """What computes and samples: a program with its weights and caches. What a token's segment gives depends
    on its own sequence alone, to the bit."""

    def results(self, outputs: Sequence[SegmentOutput], masks: Sequence[Mask | None]) -> list[RowResult]:
        """Computes one step, writing K and V of every token; gives what each segment asks for. A mask is
        `[1 + drafts, words]`."""
        ...

    def draw(self, outputs: Sequence[SegmentOutput], rounds: int) -> None:
        """Samples behind each segment, which ends with its row's last token, and goes on behind the sample,
        `rounds` tokens in all: they are appended to the rows. Fewer where logits are not finite."""
        ...

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """Copies physical pages within their groups, in order."""
        ...

    def close(self) -> None:
        """Releases everything. Idempotent."""
        ...


class Ahead(Protocol):
    """Draws drafts of one row with a draft model behind a step of its target, while the step's caller goes
    on: tokens that nobody may ask for, in pages that must stay the row's until they are taken."""

    def prepare(self, row: Row, num_known: int, num_computed: int, num_drafts: int, count: int) -> bool:
        """The target's next step has one segment: the last of `num_known` tokens of `row` and `num_drafts`
        that stand behind them in it. `count` tokens are to be drawn behind what it samples; the draft model
        has computed the first `num_computed`. False where it cannot."""
        ...

    def take(self, *, is_wanted: bool) -> tuple[int, list[int]] | None:
        """Waits until nothing is being drawn: how many tokens the row had, and those drawn behind. None where
        nothing was, or where it is not wanted."""
        ...

    def close(self) -> None:
        """Waits until nothing is being drawn, and releases everything. Idempotent."""
        ...


@runtime_checkable
class AheadCapable(Protocol):
    """A target's `StepModel` whose steps can have drafts drawn behind them."""

    def ahead(self, draft: StepModel) -> Ahead | None:
        """What draws with `draft`; None where the two do not fit together."""
        ...


class DraftModel(Protocol):
    """What proposes tokens for rows, and is told who enters and leaves them."""

    def apply(self, diff: RowDiff) -> None: ...

    def expect(self, segments: Sequence[Segment]) -> None:
        """A step of `segments` is the target's next: what will be asked for behind it may be drawn then."""
        ...

    def propose(self, known: Sequence[tuple[int, Sequence[int]]], k: int) -> tuple[tuple[int, ...], ...]:
        """Up to `k` tokens behind each (row, its tokens)."""
        ...

    def close(self) -> None:
        """Releases everything. Idempotent."""
        ...


@runtime_checkable
class DraftCapable(Protocol):
    """An executor that takes part in speculation with a draft model, as the one or the other."""

    @property
    def caps(self) -> ExecutorCaps: ...

    @property
    def model(self) -> StepModel:
        """What computes its steps, for whoever keeps rows of its own."""
        ...

    def attach(self, draft_model: DraftModel) -> None:
        """Proposes with `draft_model` from now on, and closes it with itself. Before the first row enters."""
        ...


class LogitsModel(Protocol):
    """What computes logits."""

    def run(self, sequences: Sequence[SequencePart]) -> Iterator[TileLogits]:
        """Computes one step, writing K and V of every token; yields the wanted logits as they come."""
        ...

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        """As `StepModel` has it."""
        ...

    def close(self) -> None:
        """As `StepModel` has it."""
        ...


class OracleSampled:
    """A `StepModel` that samples with the oracle from the logits of a `LogitsModel`."""

    def __init__(self, model: LogitsModel) -> None:
        self._model = model

    def results(self, outputs: Sequence[SegmentOutput], masks: Sequence[Mask | None]) -> list[RowResult]:
        for tile in self._model.run([output.sequence for output in outputs]):
            for (index, token), logits in zip(tile.owners, tile.logits, strict=True):
                outputs[index].take(token, logits)
        return [output.result(mask) for output, mask in zip(outputs, masks, strict=True)]

    def draw(self, outputs: Sequence[SegmentOutput], rounds: int) -> None:
        draw_by_steps(self, outputs, rounds)

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        self._model.copy_pages(copies)

    def close(self) -> None:
        self._model.close()


class SteppedExecutor:
    """`runtime.protocol.Executor` over a `StepModel`. The work of a step is done in `submit`."""

    def __init__(self, model: StepModel, caps: ExecutorCaps) -> None:
        self._model = model
        self._caps = caps
        self._rows: dict[int, Row] = {}
        self._done: dict[Ticket, StepResult] = {}
        self._num_tickets = 0
        self._is_open = True
        self._draft_model: DraftModel | None = None

    @property
    def caps(self) -> ExecutorCaps:
        return self._caps

    @property
    def model(self) -> StepModel:
        """What computes its steps."""
        return self._model

    def attach(self, draft_model: DraftModel) -> None:
        """Proposes with `draft_model` from now on, and closes it with itself. Before the first row enters."""
        _expect(not self._rows, "a draft model comes after the first row")
        self._draft_model = draft_model
        self._caps = replace(self._caps, can_propose=True)

    def apply(self, diff: RowDiff) -> None:
        if self._draft_model is not None:
            self._draft_model.apply(diff)
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
        outputs = [SegmentOutput(segment, self._row(segment.row)) for segment in plan.segments]
        if self._draft_model is not None:
            self._draft_model.expect(plan.segments)
        results = tuple(self._model.results(outputs, _split_masks(plan)))
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
        if self._draft_model is None:
            raise InternalError(
                "runtime.no_draft_model",
                f"The {self._caps.name} executor was asked for drafts.",
                "It has no draft model, and says so in its capabilities.",
                "Report this with the runtime settings that led to it.",
            )
        known = [(row, self._row(row).token_ids) for row in rows]
        return Drafts(token_ids=self._draft_model.propose(known, k))

    def close(self) -> None:
        if self._is_open:
            if self._draft_model is not None:
                self._draft_model.close()
            self._model.close()
        self._is_open = False
        self._rows.clear()
        self._done.clear()

    def _row(self, row: int) -> Row:
        _expect(row in self._rows, f"row {row} is empty")
        return self._rows[row]


def draw_by_steps(model: StepModel, outputs: Sequence[SegmentOutput], rounds: int) -> None:
    """`StepModel.draw` as a step for each round."""
    for left in range(rounds, 0, -1):
        going: list[SegmentOutput] = []
        results = model.results(outputs, [None] * len(outputs)) if outputs else []
        for output, result in zip(outputs, results, strict=True):
            output.row.token_ids.extend(result.token_ids)
            if result.token_ids and left > 1:
                start = len(output.row.token_ids) - 1
                going.append(
                    SegmentOutput(Segment(row=output.segment.row, start=start, num_tokens=1), output.row)
                )
        outputs = going


def _split_masks(plan: StepPlan) -> list[Mask | None]:
    """The mask rows of each segment."""
    if plan.grammar_mask is None:
        return [None] * len(plan.segments)
    sizes = [1 + len(segment.draft_ids) for segment in plan.segments]
    _expect(len(plan.grammar_mask) == sum(sizes), "the grammar mask has another number of rows than samples")
    return plan.masks()


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InternalError(
            "runtime.step_contract",
            "The engine asked the executor for something that makes no sense.",
            f"The contract between the two was broken: {what}.",
            "Report this with the request mix that led to it.",
        )
