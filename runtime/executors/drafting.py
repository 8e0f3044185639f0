"""A draft model beside the model it drafts for: its own pages, its own prefix cache, its own idea of each
row. Knows tokens and pages; when drafting pays is the engine's question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..blocks import BlockManager, SequenceBlocks
from ..protocol import ExecutorCaps, LogitsWanted, RowDiff, Segment
from .rows import Row, SegmentOutput
from .stepped import StepModel

# Tokens that rows may be behind in one call: reading more would hold up everybody's next token.
MAX_CATCH_UP = 512


@dataclass(slots=True, eq=False)
class _DraftRow:
    """What the draft model knows of a row: the first `num_known` of `row.token_ids` are the row's own, the
    rest was drafted; `num_computed` of them have their keys and values in `blocks`."""

    row: Row
    num_known: int
    num_computed: int = 0
    blocks: SequenceBlocks | None = None


class Drafter:
    """Proposes tokens for rows with a smaller model of the same vocabulary.

    It samples as the target does (same parameters, same noise), so that equal distributions give equal
    tokens. What it computed stays valid up to the first draft that was not accepted; from there on, and after
    a preemption or a prefix that only the target has cached, it catches up when it is next asked.
    """

    def __init__(self, model: StepModel, caps: ExecutorCaps) -> None:
        self._model = model
        self._caps = caps
        self._blocks = BlockManager(caps.cache, caps.num_blocks)
        self._rows: dict[int, _DraftRow] = {}

    def apply(self, diff: RowDiff) -> None:
        """Enter and leave rows, as the target's executor does."""
        for number in diff.leave:
            left = self._rows.pop(number, None)
            if left is not None and left.blocks is not None:
                self._blocks.close(left.blocks)
        for entry in diff.enter:
            plain = replace(entry, sampling=replace(entry.sampling, logprobs=None))
            self._rows[entry.row] = _DraftRow(Row(plain, self._caps.cache), len(entry.token_ids))

    def propose(self, known: Sequence[tuple[int, Sequence[int]]], k: int) -> tuple[tuple[int, ...], ...]:
        """Up to `k` tokens behind each (row, its tokens); none for a row that has to catch up further, or for
        which the draft model has no pages or positions left."""
        rows = [self._rows[number] for number, _ in known]
        for each, (_, token_ids) in zip(rows, known, strict=True):
            self._learn(each, token_ids)
        self._draw([each for each in rows if self._reserve(each, k)], k)
        return tuple(tuple(each.row.token_ids[each.num_known :]) for each in rows)

    def close(self) -> None:
        """Releases the draft model. Idempotent."""
        self._model.close()
        self._rows.clear()

    def _learn(self, each: _DraftRow, token_ids: Sequence[int]) -> None:
        """The row's tokens are now `token_ids`; drafts that were not accepted are forgotten."""
        held = each.row.token_ids
        equal = each.num_known
        while equal < len(held) and equal < len(token_ids) and held[equal] == token_ids[equal]:
            equal += 1
        del held[equal:]
        held.extend(token_ids[equal:])
        each.num_known = len(held)
        each.num_computed = min(each.num_computed, equal, len(held) - 1)
        if each.blocks is not None:
            self._blocks.commit(each.blocks, held, each.num_computed)

    def _reserve(self, each: _DraftRow, k: int) -> bool:
        """Takes pages for what one call reads and `k` tokens behind. False when there are none, or no
        positions."""
        if each.num_known + k > self._caps.max_context:
            return False
        if each.blocks is None:
            hit = self._blocks.lookup(each.row.token_ids)
            if not self._has(self._blocks.cost(hit, each.num_known + k, MAX_CATCH_UP)):
                return False
            each.blocks = self._blocks.open(hit, each.num_known)
            each.num_computed = hit.num_tokens
        end = min(each.num_known, each.num_computed + MAX_CATCH_UP) + k
        if end > each.blocks.capacity:
            if not self._has(self._blocks.missing(each.blocks, end)):
                return False
            self._blocks.extend(each.blocks, end)
        for group, index, page in each.blocks.unsent:
            each.row.set_page(group, index, page)
        each.blocks.unsent.clear()
        return True

    def _has(self, pages: Sequence[int]) -> bool:
        return all(need <= have for need, have in zip(pages, self._blocks.available(), strict=True))

    def _draw(self, rows: Sequence[_DraftRow], k: int) -> None:
        """Reads what is not computed of each row, as far as the budget goes, and draws `k` tokens behind
        those that were read to their end."""
        budget = min(MAX_CATCH_UP + len(rows), self._caps.max_tokens)
        behind: list[SegmentOutput] = []
        ready: list[_DraftRow] = []
        outputs: list[SegmentOutput] = []
        for each in rows:
            count = min(each.num_known - each.num_computed, MAX_CATCH_UP, budget)
            if count:
                output = self._output(each, count)
                each.num_computed += count
                budget -= count
                if output.samples:
                    ready.append(each)
                    outputs.append(output)
                else:
                    behind.append(output)
        if behind:
            self._model.results(behind, [None] * len(behind))
        if outputs:
            self._model.draw(outputs, k)
        for each in ready:
            each.num_computed = max(each.num_computed, len(each.row.token_ids) - 1)

    def _output(self, each: _DraftRow, num_tokens: int) -> SegmentOutput:
        """The next tokens of a row that are not computed; samples behind the last one."""
        start = each.num_computed
        is_last = start + num_tokens == len(each.row.token_ids)
        segment = Segment(
            row=each.row.entry.row,
            start=start,
            num_tokens=num_tokens,
            logits=LogitsWanted.LAST if is_last else LogitsWanted.NONE,
        )
        return SegmentOutput(segment, each.row)
