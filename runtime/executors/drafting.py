"""A draft model beside the model it drafts for: its own pages, its own prefix cache, its own idea of each
row. Knows tokens and pages; when drafting pays is the engine's question."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..blocks import BlockManager, SequenceBlocks
from ..pace import Pace
from ..protocol import ExecutorCaps, LogitsWanted, RowDiff, Segment
from .rows import Row, SegmentOutput
from .stepped import Ahead, StepModel

# Tokens that rows may be behind in one call: reading more would hold up everybody's next token.
MAX_CATCH_UP = 512
# Drafts are drawn ahead again after so many calls without, where waiting for them took longer; of so many
# waits one is timed.
RETRY_CALLS, TIMED_EVERY = 1024, 8


@dataclass(slots=True, eq=False)
class _DraftRow:
    """What the draft model knows of a row: the first `num_known` of `row.token_ids` are the row's own, the
    rest was drafted; `num_computed` of them have their keys and values in `blocks`."""

    row: Row
    num_known: int
    num_computed: int = 0
    blocks: SequenceBlocks | None = None


class _Worth:
    """Whether to have drafts drawn ahead: while waiting for them takes no longer than drawing them when they
    are asked for, with all threads. Microseconds a draft of both."""

    def __init__(self) -> None:
        self.pays = False  # not before it is known what a call takes
        self._waits = Pace()
        self._calls = Pace()
        self._num_calls = 0

    def observe_wait(self, seconds: float, count: int) -> None:
        """Drafts that were drawn ahead, `count` of them, were waited for."""
        self._num_calls = 0
        self._waits.observe(max(seconds * 1e6, 0.1) / count)
        self.pays = self._waits.factor <= self._calls.factor

    def observe_call(self, seconds: float, count: int) -> None:
        """So many were drawn when they were asked for."""
        self._calls.observe(max(seconds * 1e6, 0.1) / count)
        self._num_calls += 1
        if self._num_calls == RETRY_CALLS:
            self._num_calls, self._waits = 0, Pace()
        self.pays = self._waits.factor <= self._calls.factor


class Drafter:
    """Proposes tokens for rows with a smaller model of the same vocabulary.

    It samples as the target does (same parameters, same noise), so that equal distributions give equal
    tokens. What it computed stays valid up to the first draft that was not accepted; from there on, and after
    a preemption or a prefix that only the target has cached, it catches up when it is next asked.

    Where the target can (`ahead`), the drafts of a row that is drafted for alone are drawn behind the step
    that verifies its last ones. What was drawn for nobody is as if it had not been: it stands behind the
    tokens that count as computed.
    """

    def __init__(
        self,
        model: StepModel,
        caps: ExecutorCaps,
        ahead: Ahead | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._caps = caps
        self._blocks = BlockManager(caps.cache, caps.num_blocks)
        self._rows: dict[int, _DraftRow] = {}
        self._ahead = ahead
        self._clock = clock
        self._worth = _Worth()
        self._asked: tuple[_DraftRow, int] | None = None  # the only row of the last call, and its drafts
        self._is_ahead = False  # whether drafts of that row are being drawn
        self.num_taken = 0  # times that they were there when they were asked for

    def apply(self, diff: RowDiff) -> None:
        """Enter and leave rows, as the target's executor does."""
        self._drop()
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
        if self._is_ahead and (drawn := self._take(known, k)):
            return (drawn,)
        started_s = self._clock()
        rows = [self._rows[number] for number, _ in known]
        for each, (_, token_ids) in zip(rows, known, strict=True):
            self._learn(each, token_ids)
        is_alone = len(rows) == 1 and rows[0].num_known <= rows[0].num_computed + 2
        self._draw([each for each in rows if self._reserve(each, k)], k)
        self._asked = (rows[0], k) if len(rows) == 1 else None
        if is_alone:
            self._worth.observe_call(self._clock() - started_s, k)
        return tuple(tuple(each.row.token_ids[each.num_known :]) for each in rows)

    def expect(self, segments: Sequence[Segment]) -> None:
        """A step of `segments` is the target's next. Where it verifies what was proposed for one row, as much
        again is drawn behind it."""
        self._drop()
        if self._ahead is None or self._asked is None or len(segments) != 1 or not self._worth.pays:
            return
        (each, count), segment = self._asked, segments[0]
        draft_ids, num_known = segment.draft_ids, each.num_known
        if not draft_ids or self._rows.get(segment.row) is not each or segment.start + 1 != num_known:
            return
        last = num_known + len(draft_ids)
        is_drawn = tuple(each.row.token_ids[num_known:last]) == draft_ids
        if is_drawn and self._extend(each, last + 1, count):
            self._is_ahead = self._ahead.prepare(
                each.row, num_known, each.num_computed, len(draft_ids), count
            )

    def close(self) -> None:
        """Releases the draft model. Idempotent."""
        if self._ahead is not None:
            self._ahead.close()
        self._model.close()
        self._rows.clear()

    def _take(self, known: Sequence[tuple[int, Sequence[int]]], k: int) -> tuple[int, ...]:
        """Makes what was drawn ahead the row's, where the row is the only one: up to `k` tokens of it."""
        assert self._ahead is not None
        assert self._asked is not None
        self._is_ahead = False
        each, count = self._asked
        is_wanted = len(known) == 1 and self._rows.get(known[0][0]) is each
        is_timed = self.num_taken % TIMED_EVERY == 0
        started_s = self._clock() if is_timed else 0.0
        drawn = self._ahead.take(is_wanted=is_wanted)
        if drawn is None:
            return ()
        if is_timed:
            self._worth.observe_wait(self._clock() - started_s, count)
        self.num_taken += 1
        num_known, draft_ids = drawn
        self._learn(each, known[0][1])
        if num_known != each.num_known:
            return ()
        held = each.row.token_ids
        held.extend(draft_ids)
        each.num_computed = max(each.num_computed, len(held) - 1)
        if k != count:
            self._asked = (each, k)
        return tuple(draft_ids[:k])

    def _drop(self) -> None:
        """What is being drawn ahead is no longer wanted; its pages may be given away."""
        if self._is_ahead:
            assert self._ahead is not None
            self._ahead.take(is_wanted=False)
            self._is_ahead = False

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
        return self._extend(each, min(each.num_known, each.num_computed + MAX_CATCH_UP), k)

    def _extend(self, each: _DraftRow, num_tokens: int, k: int) -> bool:
        """The same for the first `num_tokens` tokens of a row that has pages."""
        end = num_tokens + k
        if each.blocks is None or end > self._caps.max_context:
            return False
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
