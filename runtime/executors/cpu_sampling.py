"""Sampling inside of generated code: what each segment asks for as jobs of a step, and their results.
Knows requests and the layout of a job; the arithmetic is kernels/cpu/sampling.hpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..protocol import BlockCopy, RowResult, TokenLogprob
from .cpu_library import SAMPLE_JOB
from .cpu_model import CpuModel, Jobs, Owner
from .rows import Row, SegmentOutput

Mask = NDArray[np.uint32]
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
    """The part of a row's jobs that does not change, and its tokens where penalties read them."""

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
        self.job = np.zeros(1, SAMPLE_JOB)
        for name in _COPIED:
            self.job[name] = getattr(sampling, name)
        self.job["num_prompt_tokens"] = row.entry.num_prompt_tokens
        self.job["banned"], self.job["num_banned"] = self._banned.ctypes.data, len(self._banned)
        self.job["bias_ids"], self.job["biases"] = self._bias_ids.ctypes.data, self._biases.ctypes.data
        self.job["num_biases"] = len(self._biases)
        self.job["known"] = -1
        self.job["wants_logprob"] = sampling.logprobs is not None
        self.job["num_top"] = sampling.logprobs or 0

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
        self._tokens[self._num_tokens : length] = [*known[self._num_tokens :], *drafts]
        self._num_tokens = len(known)
        self.job["tokens"] = self._tokens.ctypes.data


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
        rows: list[Any] = []
        for place, (index, token) in enumerate(owners):
            output, state = outputs[index], states[index]
            if output.scores_prompt:
                rows.append(_scoring(output, state, token, place))
                self._keys.append((index, token))
            if output.samples and token >= output.first_sample:
                rows.append(_sampling(output, state, token - output.first_sample, place, masks[index]))
                self._keys.append((index, None))
        self.jobs: Jobs = np.concatenate(rows) if rows else np.empty(0, SAMPLE_JOB)
        most = max(1, int(self.jobs["num_top"].max(initial=0)))
        self._top = np.empty((len(rows), most), np.int32)
        self._top_logprobs = np.empty((len(rows), most), np.float64)
        places = np.arange(len(rows))
        self.jobs["top"] = self._top.ctypes.data + places * most * self._top.itemsize
        self.jobs["top_logprobs"] = self._top_logprobs.ctypes.data + places * most * 8

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


def _scoring(output: SegmentOutput, state: RowState, token: int, place: int) -> Jobs:
    """The logprob of the token that follows, where it is known; whether the logits are finite in any case."""
    job = state.job.copy()
    following = output.following(token)
    job["known"], job["logits_row"] = following or 0, place
    job["wants_logprob"] = following is not None
    return job


def _sampling(output: SegmentOutput, state: RowState, sample: int, place: int, mask: Mask | None) -> Jobs:
    """Sample `sample` of a segment, which sees the drafts before it."""
    job = state.job.copy()
    job["logits_row"], job["num_tokens"] = place, len(output.row.token_ids) + sample
    job["mask"] = 0 if mask is None else mask[sample].ctypes.data
    return job


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
