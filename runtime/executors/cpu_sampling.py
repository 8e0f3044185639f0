"""Sampling inside of generated code: what each segment asks for as jobs of a step, and their results.
Knows requests and the layout of a job; the arithmetic is kernels/cpu/sampling.hpp."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..protocol import BlockCopy, RowResult, TokenLogprob
from .cpu_ahead import CpuAhead
from .cpu_library import SAMPLE_JOB, Jobs
from .cpu_model import CpuModel, Owner
from .cpu_row_state import RowState
from .rows import Row, SegmentOutput
from .stepped import StepModel, draw_by_steps

Mask = NDArray[np.uint32]


def _place(name: str) -> int:
    return cast("Mapping[str, tuple[object, int]]", SAMPLE_JOB.fields)[name][1]


# What differs between the jobs of a row, as runs of neighbours in SAMPLE_JOB: (mask, logits_row, known,
# wants_logprob), num_tokens, (top, top_logprobs); and the results (finite, token, rank, num_found, logprob).
_ASKED, _ASKED_AT = Struct("=4q"), _place("mask")
_LENGTH, _LENGTH_AT = Struct("=q"), _place("num_tokens")
_TOP, _TOP_AT = Struct("=2q"), _place("top")
_FOUND, _FOUND_AT = Struct("=4qd"), _place("finite")


class CpuSampled:
    """`stepped.StepModel` over generated code: samples, logprobs and checks for NaN are made by the step's
    own threads, and no logits are read here."""

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self._states: WeakKeyDictionary[Row, RowState] = WeakKeyDictionary()

    def results(self, outputs: Sequence[SegmentOutput], masks: Sequence[Mask | None]) -> list[RowResult]:
        collected = [Collected(output) for output in outputs]
        states = [self._state(output) for output in outputs]
        sequences = [output.sequence for output in outputs]
        if self._model.takes(sequences):
            owners = tuple([(index, token) for index, each in enumerate(sequences) for token in each.wanted])
            batch = JobBatch(owners, outputs, states, masks)
            self._model.run_once(sequences, batch.jobs)
            batch.give(collected)
            return [one.result() for one in collected]
        batches: list[JobBatch] = []

        def jobs_of(owners: tuple[Owner, ...]) -> Jobs:
            batches.append(JobBatch(owners, outputs, states, masks))
            return batches[-1].jobs

        for _ in self._model.run_jobs(sequences, jobs_of):
            batches[-1].give(collected)
        return [one.result() for one in collected]

    def draw(self, outputs: Sequence[SegmentOutput], rounds: int) -> None:
        """As `stepped.StepModel` has it: all rounds in one call of generated code where it takes them."""
        sequences = [output.sequence for output in outputs]
        if not self._model.takes(sequences):
            draw_by_steps(self, outputs, rounds)
            return
        states = [self._state(output, rounds - 1) for output in outputs]
        owners = tuple((index, output.first_sample) for index, output in enumerate(outputs))
        batch = JobBatch(owners, outputs, states, [None] * len(outputs))
        drawn = self._model.run_once(sequences, batch.jobs, rounds)
        if rounds == 1:
            drawn = batch.tokens()
        for index, output in enumerate(outputs):
            known = output.row.token_ids
            for token in drawn[index :: len(outputs)]:
                if token < 0:
                    break
                known.append(token)

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        self._model.copy_pages(copies)

    def close(self) -> None:
        self._model.close()

    def ahead(self, draft: StepModel) -> CpuAhead | None:
        """What draws with `draft` behind steps of this model; None where it is no generated code."""
        if not isinstance(draft, CpuSampled):
            return None
        return CpuAhead(self._model.library, draft._model, draft._state_of)

    def _state(self, output: SegmentOutput, num_later: int = 0) -> RowState:
        """What a row's jobs have in common, with its tokens, and room for later ones."""
        state = self._state_of(output.row)
        if output.samples:
            known = output.row.token_ids
            state.hold(known, len(known), output.segment.draft_ids, num_later)
        return state

    def _state_of(self, row: Row) -> RowState:
        """The same as it is, made when the row first samples."""
        state = self._states.get(row)
        if state is None:
            state = self._states[row] = RowState(row)
        return state


class JobBatch:
    """The jobs of one call, in the order of the rows of its logits."""

    def __init__(
        self,
        owners: tuple[Owner, ...],
        outputs: Sequence[SegmentOutput],
        states: Sequence[RowState],
        masks: Sequence[Mask | None],
    ) -> None:
        self._keys: list[tuple[int, bool]] = []  # (segment, whether the token is known)
        templates: list[bytes] = []
        asked: list[tuple[int, int, int, bool]] = []
        lengths: list[int] = []
        most = 0
        for place, (index, token) in enumerate(owners):
            output, state = outputs[index], states[index]
            if output.scores_prompt:
                following = output.following(token)
                asked.append((0, place, following or 0, following is not None))
                lengths.append(0)
                templates.append(state.template)
                self._keys.append((index, True))
                most = max(most, state.num_top)
            if output.samples and token >= output.first_sample:
                sample, mask = token - output.first_sample, masks[index]
                address = 0 if mask is None else mask[sample].ctypes.data
                asked.append((address, place, -1, state.wants_logprob))
                lengths.append(len(output.row.token_ids) + sample)
                templates.append(state.template)
                self._keys.append((index, False))
                most = max(most, state.num_top)
        self._memory = array("q", b"".join(templates))
        self._fill(asked, lengths)
        self._top: list[tuple[NDArray[np.int32], NDArray[np.float64]]] = []
        if most:
            self._give_room_for_top(len(templates), most)
        self.jobs = Jobs(self._memory, self._memory.buffer_info()[0], len(templates))

    def give(self, collected: Sequence[Collected]) -> None:
        """Hand the results out to their segments, in order."""
        for place, (index, is_known) in enumerate(self._keys):
            start = place * SAMPLE_JOB.itemsize
            finite, token, rank, found, logprob = _FOUND.unpack_from(self._memory, start + _FOUND_AT)
            told: TokenLogprob | None = None
            if finite and self._asked[place][3]:
                top: tuple[tuple[int, float], ...] = ()
                if found:
                    ids, logprobs = self._top[place]
                    top = tuple(zip(ids[:found].tolist(), logprobs[:found].tolist(), strict=True))
                told = TokenLogprob(token_id=token, logprob=logprob, rank=rank, top=top)
            if is_known:
                collected[index].take_score(bool(finite), told)
            else:
                collected[index].take_sample(token if finite else None, told)

    def tokens(self) -> list[int]:
        """The token of each job, -1 where it found none."""
        size = SAMPLE_JOB.itemsize
        found = (
            _FOUND.unpack_from(self._memory, start + _FOUND_AT)
            for start in range(0, size * self.jobs.length, size)
        )
        return [token if finite else -1 for finite, token, *_ in found]

    def _fill(self, asked: list[tuple[int, int, int, bool]], lengths: Sequence[int]) -> None:
        """What differs from job to job."""
        self._asked, memory, start = asked, self._memory, 0
        for each, length in zip(asked, lengths, strict=True):
            _LENGTH.pack_into(memory, start + _LENGTH_AT, length)
            _ASKED.pack_into(memory, start + _ASKED_AT, *each)
            start += SAMPLE_JOB.itemsize

    def _give_room_for_top(self, num_jobs: int, most: int) -> None:
        """Where each job puts the alternatives it was asked for."""
        for place in range(num_jobs):
            ids, logprobs = np.empty(most, np.int32), np.empty(most, np.float64)
            self._top.append((ids, logprobs))
            start = place * SAMPLE_JOB.itemsize + _TOP_AT
            _TOP.pack_into(self._memory, start, ids.ctypes.data, logprobs.ctypes.data)


class Collected:
    """The results of one segment's jobs, put together by the rules of `sampling.sample_segment`."""

    def __init__(self, output: SegmentOutput) -> None:
        self._output = output
        self._is_finite = True
        self._scores: list[TokenLogprob] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._is_done = False
        self._has_failed = False

    def take_score(self, finite: bool, logprob: TokenLogprob | None) -> None:
        """Accept what was found for a known token."""
        self._is_finite = self._is_finite and finite
        if logprob is not None:
            self._scores.append(logprob)

    def take_sample(self, token: int | None, logprob: TokenLogprob | None) -> None:
        """Accept the next sample; those behind the first draft that differs do not count."""
        if self._is_done:
            return
        if token is None:
            self._has_failed = self._is_done = True
            return
        drafts = self._output.segment.draft_ids
        self._is_done = len(self._tokens) >= len(drafts) or drafts[len(self._tokens)] != token
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)

    def result(self) -> RowResult:
        """The segment's result."""
        row = self._output.segment.row
        if not self._is_finite:
            return RowResult(row=row, finite=False)
        if self._has_failed:
            return RowResult(row=row, prompt_logprobs=tuple(self._scores), finite=False)
        return RowResult(
            row=row,
            token_ids=tuple(self._tokens),
            num_accepted=max(0, len(self._tokens) - 1),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._scores),
        )
