"""Executors without a model, for tests and for measuring what surrounds one. `SimulatedExecutor` makes every
token depend on the whole history as read back through the pages; `NullExecutor` answers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...spec.cache import CacheGroup, CacheLayout
from ...spec.errors import InternalError
from ...spec.model import ModelSpec
from ..protocol import (
    Drafts,
    ExecutorCaps,
    LogitsWanted,
    RowDiff,
    RowEntry,
    RowResult,
    Segment,
    StepPlan,
    StepResult,
    Ticket,
    TokenLogprob,
)
from ..sampling import History, sample_segment, token_logprob
from ..visibility import first_visible

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FAVOUR = np.float32(2.0)
_SPREAD = 2.5 / 2**24


def simulated_caps(
    *,
    groups: Sequence[tuple[str, int, int, int]] = (("full", 0, 4, 64),),
    vocab_size: int = 29,
    max_context: int = 128,
    max_rows: int = 8,
    max_tokens: int = 64,
    max_in_flight: int = 1,
    can_propose: bool = False,
) -> ExecutorCaps:
    """Caps over `groups` of (kind, window, page_tokens, num_blocks), one layer each."""
    layout = CacheLayout(
        groups=tuple(
            CacheGroup(
                layers=(index,),
                kind=kind,  # pyright: ignore[reportArgumentType]
                window=window,
                num_kv_heads=1,
                k_dim=1,
                v_dim=1,
                dtype="float32",
                page_tokens=page_tokens,
            )
            for index, (kind, window, page_tokens, _) in enumerate(groups)
        )
    )
    return ExecutorCaps(
        name="simulated",
        vocab_size=vocab_size,
        max_context=max_context,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_in_flight=max_in_flight,
        cache=layout,
        num_blocks=tuple(count for *_, count in groups),
        can_propose=can_propose,
    )


def simulated_spec(caps: ExecutorCaps, eos_token_ids: tuple[int, ...] = ()) -> ModelSpec:
    """The facts of a model that is not there, in the sizes of `caps`."""
    return ModelSpec(
        family="simulated",
        architecture="Simulated",
        num_layers=len(caps.cache.groups),
        hidden_size=1,
        vocab_size=caps.vocab_size,
        max_context=caps.max_context,
        compute_dtype="float32",
        tied_head=False,
        num_parameters=0,
        attention=(),
        eos_token_ids=eos_token_ids,
    )


def mix(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014): 64 bits in, 64 well mixed bits out."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` over an array."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(slots=True)
class Faults:
    """What shall go wrong: `on_submit` and `on_collect` may raise, rows of `nan_requests` give NaN."""

    on_submit: Callable[[StepPlan], None] | None = None
    on_collect: Callable[[StepPlan], None] | None = None
    nan_requests: set[int] = field(default_factory=set[int])


@dataclass(slots=True, eq=False)
class _Row:
    """A row's tokens and block tables."""

    entry: RowEntry
    token_ids: list[int]
    tables: list[NDArray[np.int64]]
    has_failed: bool = False


@dataclass(frozen=True, slots=True)
class _Done:
    """A submitted step, its result, and the pages each row touched and wrote."""

    plan: StepPlan
    result: StepResult
    touched: dict[tuple[int, int], _Row]


class SimulatedExecutor:
    """A hash in the place of a model, over real pages.

    Each cache group is a layer: it stores one 64-bit value per position, made from the token, the
    position and every value its window shows, read through the block table. A page that is wrong,
    stale, freed too early or shared wrongly therefore changes tokens. Contract violations that a real
    device would hide (reading a missing page, writing one that a step in flight uses) raise.
    """

    def __init__(self, caps: ExecutorCaps, faults: Faults | None = None) -> None:
        self._caps = caps
        self.faults = faults or Faults()
        self._groups = caps.cache.groups
        self._pages = [
            np.zeros((count, group.page_tokens), dtype=np.uint64)
            for group, count in zip(self._groups, caps.num_blocks, strict=True)
        ]
        self._weights = mix_all(np.arange(caps.max_context + 1, dtype=np.uint64)) | np.uint64(1)
        self._vocab = np.arange(caps.vocab_size, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._rows: dict[int, _Row] = {}
        self._open: dict[int, _Done] = {}
        self._num_tickets = 0
        self.num_tokens_run = 0

    @property
    def caps(self) -> ExecutorCaps:
        return self._caps

    def apply(self, diff: RowDiff) -> None:
        for row in diff.leave:
            self._rows.pop(row, None)
        for entry in diff.enter:
            _expect(entry.row not in self._rows, f"row {entry.row} is entered twice")
            tables = [np.full(-(-self._caps.max_context // g.page_tokens), -1) for g in self._groups]
            self._rows[entry.row] = _Row(entry, list(entry.token_ids), tables)

    def submit(self, plan: StepPlan) -> Ticket:
        _expect(len(self._open) < self._caps.max_in_flight, "too many steps are in flight")
        _expect(plan.num_tokens <= self._caps.max_tokens, f"{plan.num_tokens} tokens are too many for a step")
        if self.faults.on_submit is not None:
            self.faults.on_submit(plan)
        for change in plan.block_changes:
            self._rows[change.row].tables[change.group][change.index] = change.block
        touched: dict[tuple[int, int], _Row] = {}
        rows = tuple(
            self._run(segment, touched, mask)
            for segment, mask in zip(plan.segments, plan.masks(), strict=True)
        )
        self.num_tokens_run += plan.num_tokens
        self._num_tickets += 1
        result = StepResult(step_id=plan.step_id, epoch=plan.epoch, rows=rows)
        self._open[self._num_tickets] = _Done(plan, result, touched)
        return Ticket(self._num_tickets)

    def collect(self, ticket: Ticket) -> StepResult:
        _expect(ticket == min(self._open), "steps are collected out of order")
        done = self._open.pop(ticket)
        if self.faults.on_collect is not None:
            self.faults.on_collect(done.plan)
        return done.result

    def propose(self, rows: Sequence[int], k: int) -> Drafts:
        """The favourite successor, k times: right as often as the noise lets it be."""
        drafts: list[tuple[int, ...]] = []
        for row in rows:
            token = self._rows[row].token_ids[-1]
            guess: list[int] = []
            for _ in range(k):
                token = self._favourite(token)
                guess.append(token)
            drafts.append(tuple(guess))
        return Drafts(token_ids=tuple(drafts))

    def close(self) -> None:
        self._rows.clear()
        self._open.clear()

    def _run(
        self, segment: Segment, touched: dict[tuple[int, int], _Row], mask: NDArray[np.uint32] | None
    ) -> RowResult:
        row = self._rows[segment.row]
        if row.has_failed:
            return RowResult(row=segment.row, finite=False)
        known = segment.num_tokens - len(segment.draft_ids)
        expected = row.token_ids[segment.start : segment.start + known]
        _expect(len(expected) == known, "a segment runs ahead of its row's tokens")
        _expect(segment.token_ids in ((), tuple(expected)), "a segment's ids are not its row's tokens")
        token_ids = [*row.token_ids[: segment.start + known], *segment.draft_ids]
        logits = np.stack(
            [
                self._forward(row, token_ids[position], position, touched)
                for position in range(segment.start, segment.start + segment.num_tokens)
            ]
        )
        if row.entry.request_id in self.faults.nan_requests:
            logits[:] = np.nan
        prompt_logprobs = self._prompt_logprobs(row, segment, logits)
        ends = segment.start + known == len(row.token_ids)
        if segment.logits is LogitsWanted.NONE or not ends:
            return RowResult(row=segment.row, prompt_logprobs=prompt_logprobs)
        history = History(token_ids=row.token_ids, num_prompt_tokens=row.entry.num_prompt_tokens)
        result = sample_segment(
            segment.row, logits[known - 1 :], row.entry.sampling, history, segment.draft_ids, mask
        )
        row.token_ids.extend(result.token_ids)
        row.has_failed = not result.finite
        if not prompt_logprobs:
            return result
        return RowResult(
            row=result.row,
            token_ids=result.token_ids,
            logprobs=result.logprobs,
            prompt_logprobs=prompt_logprobs,
            finite=result.finite,
        )

    def _prompt_logprobs(
        self, row: _Row, segment: Segment, logits: NDArray[np.float32]
    ) -> tuple[TokenLogprob, ...]:
        if segment.logits is not LogitsWanted.PROMPT:
            return ()
        following = row.token_ids[segment.start + 1 : segment.start + segment.num_tokens + 1]
        num_top = row.entry.sampling.logprobs or 0
        return tuple(
            token_logprob(each, token, num_top) for each, token in zip(logits, following, strict=False)
        )

    def _forward(
        self, row: _Row, token_id: int, position: int, touched: dict[tuple[int, int], _Row]
    ) -> NDArray[np.float32]:
        """Writes and reads every group's pages at one position; logits `[vocab]`."""
        state = mix(token_id * _GOLDEN + position)
        for index, group in enumerate(self._groups):
            page = int(row.tables[index][position // group.page_tokens])
            _expect(page >= 0, f"position {position} has no page in group {index}")
            self._claim(index, page, row, touched)
            self._pages[index][page, position % group.page_tokens] = mix(state + index)
            state = mix((state + self._read(row, index, group, position)) & _MASK)
        bits = mix_all(self._vocab + np.uint64(state)) >> np.uint64(40)
        logits = (bits.astype(np.float64) * _SPREAD).astype(np.float32)
        logits[self._favourite(token_id)] += _FAVOUR
        return logits

    def _read(self, row: _Row, index: int, group: CacheGroup, position: int) -> int:
        seen = np.arange(first_visible(group, position), position + 1)
        pages = row.tables[index][seen // group.page_tokens]
        _expect(int(pages.min()) >= 0, f"position {position} reads a page that is gone in group {index}")
        values = self._pages[index][pages, seen % group.page_tokens]
        return int((values * self._weights[seen]).sum(dtype=np.uint64))

    def _claim(self, index: int, page: int, row: _Row, touched: dict[tuple[int, int], _Row]) -> None:
        """A page may be written by one row only, and by no other than a step in flight has."""
        for used in (touched, *(done.touched for done in self._open.values())):
            _expect(used.get((index, page), row) is row, f"page {page} of group {index} is still in use")
        touched[index, page] = row

    def _favourite(self, token_id: int) -> int:
        return (token_id * 5 + 3) % self._caps.vocab_size


class NullExecutor:
    """Answers every step at once with the same token: what remains is the cost of everything else."""

    def __init__(self, caps: ExecutorCaps, token_id: int = 1) -> None:
        self._caps = replace(caps, name="null")
        self._token_ids = (token_id,)
        self._plans: dict[int, StepPlan] = {}
        self._num_tickets = 0

    @property
    def caps(self) -> ExecutorCaps:
        return self._caps

    def apply(self, diff: RowDiff) -> None:
        """No rows are kept."""

    def submit(self, plan: StepPlan) -> Ticket:
        self._num_tickets += 1
        self._plans[self._num_tickets] = plan
        return Ticket(self._num_tickets)

    def collect(self, ticket: Ticket) -> StepResult:
        plan = self._plans.pop(ticket)
        rows = tuple(
            RowResult(
                row=segment.row, token_ids=() if segment.logits is LogitsWanted.NONE else self._token_ids
            )
            for segment in plan.segments
        )
        return StepResult(step_id=plan.step_id, epoch=plan.epoch, rows=rows)

    def propose(self, rows: Sequence[int], k: int) -> Drafts:
        return Drafts(token_ids=((),) * len(rows))

    def close(self) -> None:
        self._plans.clear()


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InternalError(
            "simulated.contract",
            f"The engine broke the executor's contract: {what}.",
            "The simulated executor checks what a device would not.",
            "Report this with the request mix that led to it.",
        )
