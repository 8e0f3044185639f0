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
from .cpu_library import SAMPLE_JOB, Jobs
from .cpu_model import CpuModel, Owner
from .rows import Row, SegmentOutput
from .stepped import draw_by_steps

Mask = NDArray[np.uint32]


def _place(name: str) -> int:
    return cast("Mapping[str, tuple[object, int]]", SAMPLE_JOB.fields)[name][1]


# What differs between the jobs of a row, as runs of neighbours in SAMPLE_JOB: (mask, logits_row, known,
# wants_logprob), num_tokens, (top, top_logprobs); and the results (finite, token, rank, num_found, logprob).
_ASKED, _ASKED_AT = Struct("=4q"), _place("mask")
_LENGTH, _LENGTH_AT = Struct("=q"), _place("num_tokens")
_TOP, _TOP_AT = Struct("=2q"), _place("top")
_FOUND, _FOUND_AT = Struct("=4qd"), _place("finite")
_COPIED = (
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "top_p",
    "seed",
    "top_k",
    "min_tokens",
)


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

    def _state(self, output: SegmentOutput, num_later: int = 0) -> RowState:
        """What a row's jobs have in common, made when it first samples; with room for later tokens."""
        state = self._states.get(output.row)
        if state is None:
            state = self._states[output.row] = RowState(output.row)
        state.extend(output, num_later)
        return state


class RowState:
    """The part of a row's jobs that does not change, and its tokens where penalties read them. `template` is
    that part as the bytes of a job: joining arrays would promote each field of each of them."""

    def __init__(self, row: Row) -> None:
        sampling = row.entry.sampling
        self._banned = np.asarray(sampling.banned_until_min, np.int64)
        self._bias_ids = np.asarray([token for token, _ in sampling.logit_bias], np.int64)
        self._biases = np.asarray([bias for _, bias in sampling.logit_bias], np.float32)
        self._tokens = np.empty(0, np.int64)
        self._num_tokens = 0
        self._reads_tokens = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self.wants_logprob = sampling.logprobs is not None
        self.num_top = sampling.logprobs or 0
        self._job = np.zeros(1, SAMPLE_JOB)
        for name in _COPIED:
            self._job[name] = getattr(sampling, name)
        self._job["num_prompt_tokens"] = row.entry.num_prompt_tokens
        self._job["banned"], self._job["num_banned"] = self._banned.ctypes.data, len(self._banned)
        self._job["bias_ids"], self._job["biases"] = self._bias_ids.ctypes.data, self._biases.ctypes.data
        self._job["num_biases"] = len(self._biases)
        self._job["num_top"] = self.num_top
        self.template = self._job.tobytes()

    def extend(self, output: SegmentOutput, num_later: int) -> None:
        """Brings the tokens up to the row's, with the segment's drafts, and room for `num_later`, behind."""
        if not self._reads_tokens or not output.samples:
            return
        known, drafts = output.row.token_ids, output.segment.draft_ids
        length = len(known) + len(drafts)
        if length + num_later > len(self._tokens):
            grown = np.empty(2 * (length + num_later), np.int64)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
            self._job["tokens"] = grown.ctypes.data
            self.template = self._job.tobytes()
        self._tokens[self._num_tokens : length] = [*known[self._num_tokens :], *drafts]
        self._num_tokens = len(known)


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
