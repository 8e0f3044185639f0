"""Drafts that an idle worker of the target's engine draws, while the caller of the step that verified the
last ones goes on. Knows addresses and one row; when it pays is the drafter's question."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable

from .cpu_library import SAMPLE_JOB, CpuLibrary
from .cpu_model import CpuModel
from .cpu_row_state import RowState
from .rows import Row

# `DraftAhead` of kernels/cpu/step.hpp: places of what changes, and how many ids it has room for.
_NUM_COMPUTED, _FAULT, _START, _NUM_IDS, _FIXED = 4, 5, 6, 7, 8
MOST_IDS = 64


class CpuAhead:
    """`stepped.Ahead` between two units of generated code: a step of `target`, which samples in C++ and so
    knows which drafts it accepts, hands what the draft model has to read next to a worker of its own pool.
    The worker runs the draft's code in an engine of one thread. Not thread-safe."""

    def __init__(self, target: CpuLibrary, draft: CpuModel, state_of: Callable[[Row], RowState]) -> None:
        self._target = target
        self._state_of = state_of
        self._draft = draft
        self._library = draft.beside()
        self._tables = [array("q") for _ in draft.layout.groups]
        self._job = array("q", bytes(SAMPLE_JOB.itemsize))
        self._drawn = array("q", bytes(8 * MOST_IDS))
        self._memory = array("q", bytes(8 * (5 + len(self._tables))))
        self._row: Row | None = None
        self._state: RowState | None = None
        self._made: tuple[object, ...] = ()
        self._fields = array("q")
        self._ahead = array("q", bytes(8 * (_FIXED + MOST_IDS)))
        self._address = self._ahead.buffer_info()[0]
        self._count = 0
        # Whoever drops all of it without closing must not free what a worker still reads.
        self._end = weakref.finalize(self, target.finish, False)
        self._end.atexit = False

    def prepare(self, row: Row, num_known: int, num_computed: int, num_drafts: int, count: int) -> bool:
        """As `stepped.Ahead` has it."""
        if num_drafts + 2 > MOST_IDS or count > MOST_IDS:
            return False
        state = self._state if row is self._row and self._state is not None else self._state_of(row)
        state.hold(row.token_ids, num_known, (), 1 + count)
        made = (row.num_page_changes, state.template, count)
        if row is not self._row or made != self._made:
            self._bind(row, state, count)
            self._row, self._state, self._made = row, state, made
        self._ahead[_NUM_COMPUTED] = num_computed
        self._target.follow(self._address)
        return True

    def take(self, *, is_wanted: bool) -> tuple[int, list[int]] | None:
        """As `stepped.Ahead` has it. InternalError where generated code refused to draw."""
        if not self._target.finish(is_wanted) or not is_wanted:
            return None
        fault, start, num_ids = self._ahead[_FAULT:_FIXED]
        if fault:
            self._library.refuse(fault)
        drawn = self._drawn[: self._count].tolist()
        return start + num_ids, drawn[: drawn.index(-1)] if -1 in drawn else drawn

    def close(self) -> None:
        """Waits for what is under way, and ends the engine. Idempotent."""
        self._end()
        self._library.close()

    def _bind(self, row: Row, state: RowState, count: int) -> None:
        """Points generated code to the pages and the sampling of a row."""
        self._tables = [array("q", table) for table in row.tables]
        self._job = array("q", state.template)
        tail = (
            self._draft.logits_address,
            self._job.buffer_info()[0],
            count,
            self._drawn.buffer_info()[0],
            self._memory.buffer_info()[0],
        )
        tables = [table.buffer_info()[0] for table in self._tables]
        drawing = self._library.drawing(tables, list(map(len, self._tables)), tail)
        self._fields = drawing.fields
        self._count = count
        head = (drawing.call, drawing.engine, self._fields.buffer_info()[0], len(self._fields))
        self._ahead[: len(head)] = array("q", head)
