"""Sampling inside of generated code: what each segment asks for as jobs of a step, and their results.
Knows requests and the layout of a job; the arithmetic is kernels/cpu/sampling.hpp."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..protocol import BlockCopy, RowResult, TokenLogprob
from .cpu_library import NO_JOBS, SAMPLE_JOB
from .cpu_model import CpuModel, Jobs, Owner
from .rows import Row, SegmentOutput

Mask = NDArray[np.uint32]
# What differs between the jobs of a row, in the order of `_FIELDS`.
_Fields = tuple[int, int, int, bool, int]
_FIELDS = ("logits_row", "num_tokens", "known", "wants_logprob", "mask")
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
        batches: list[JobBatch] = []

        def jobs_of(owners: tuple[Owner, ...]) -> Jobs:
            batches.append(JobBatch(owners, outputs, states, masks))
            return batches[-1].jobs

        for _ in self._model.run_jobs([output.sequence for output in outputs], jobs_of):
            batches[-1].give(collected)
        return [one.result() for one in collected]

    def copy_pages(self, copies: Sequence[BlockCopy]) -> None:
        self._model.copy_pages(copies)

    def close(self) -> None:
        self._model.close()

    def _state(self, output: SegmentOutput) -> RowState:
        """What a row's jobs have in common; made when it first samples."""
        if output.row not in self._states:
            self._states[output.row] = RowState(output.row)
        state = self._states[output.row]
        state.extend(output)
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

    def extend(self, output: SegmentOutput) -> None:
        """Brings the tokens up to the row's, with the segment's drafts behind them."""
        if not self._reads_tokens or not output.samples:
            return
        known, drafts = output.row.token_ids, output.segment.draft_ids
        length = len(known) + len(drafts)
        if length > len(self._tokens):
            grown = np.empty(2 * length, np.int64)
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
        self._keys: list[tuple[int, int | None]] = []  # (segment, known token, None for a sample)
        templates: list[bytes] = []
        rows: list[_Fields] = []
        most = 1
        for place, (index, token) in enumerate(owners):
            output, state = outputs[index], states[index]
            if output.scores_prompt:
                rows.append(_scoring(output, token, place))
                templates.append(state.template)
                self._keys.append((index, token))
                most = max(most, state.num_top)
            if output.samples and token >= output.first_sample:
                rows.append(_sampling(output, state, token - output.first_sample, place, masks[index]))
                templates.append(state.template)
                self._keys.append((index, None))
                most = max(most, state.num_top)
        self._top = np.empty((len(rows), most), np.int32)
        self._top_logprobs = np.empty((len(rows), most), np.float64)
        self.jobs: Jobs = NO_JOBS
        if rows:
            self.jobs = np.frombuffer(b"".join(templates), np.uint8).copy().view(SAMPLE_JOB)
            self._fill(rows)

    def _fill(self, rows: Sequence[_Fields]) -> None:
        """What differs from job to job, a field at a time."""
        for name, column in zip(_FIELDS, zip(*rows, strict=True), strict=True):
            self.jobs[name] = column
        places = np.arange(len(rows))
        self.jobs["top"] = self._top.ctypes.data + places * self._top.strides[0]
        self.jobs["top_logprobs"] = self._top_logprobs.ctypes.data + places * self._top_logprobs.strides[0]

    def give(self, collected: Sequence[Collected]) -> None:
        """Hand the results out to their segments, in order."""
        columns = [self.jobs[name].tolist() for name in ("finite", "token", "wants_logprob")]
        for place, ((index, scored), finite, token, wants) in enumerate(
            zip(self._keys, *columns, strict=True)
        ):
            logprob = self._logprob(place, token) if finite and wants else None
            if scored is None:
                collected[index].take_sample(token if finite else None, logprob)
            else:
                collected[index].take_score(bool(finite), logprob)

    def _logprob(self, place: int, token: int) -> TokenLogprob:
        job = self.jobs[place]
        found = int(job["num_found"])
        top = zip(self._top[place, :found].tolist(), self._top_logprobs[place, :found].tolist(), strict=True)
        return TokenLogprob(
            token_id=token, logprob=float(job["logprob"]), rank=int(job["rank"]), top=tuple(top)
        )


def _scoring(output: SegmentOutput, token: int, place: int) -> _Fields:
    """The logprob of the token that follows, where it is known; whether the logits are finite in any case."""
    following = output.following(token)
    return place, 0, following or 0, following is not None, 0


def _sampling(output: SegmentOutput, state: RowState, sample: int, place: int, mask: Mask | None) -> _Fields:
    """Sample `sample` of a segment, which sees the drafts before it."""
    address = 0 if mask is None else mask[sample].ctypes.data
    return place, len(output.row.token_ids) + sample, -1, state.wants_logprob, address


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
