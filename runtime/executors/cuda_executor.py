"""The executor that runs ahead: rows and sampling on the device, steps replayed or launched, results read
when they are collected. Knows steps and rows; no kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.cuda.sampler import DeviceSampler, Samples, SampleSpace, make_space
from ...spec.errors import DeviceLostError, InternalError, LlmcError
from ..protocol import (
    Drafts,
    ExecutorCaps,
    RowDiff,
    RowResult,
    StepPlan,
    StepResult,
    Ticket,
    TokenLogprob,
)
from ..sampling import is_finite, token_logprob
from .cuda_control import keys_read_again, write_control
from .cuda_device import Device
from .cuda_listed_sampler import ListedSampler
from .cuda_model import CudaModel
from .cuda_rows import UNKNOWN, DeviceRows
from .cuda_samples import filters, samples_of
from .cuda_steps import StepGraphs
from .rows import SegmentOutput
from .stepped import DraftModel, OracleSampled, StepModel

# Ways to run a step beside launching each kernel as its operator is computed, and their settings.
GRAPHS, LISTS = "recorded steps", "launch lists"
_SETTINGS = {GRAPHS: "device_graphs", LISTS: "device_lists"}
# Logits of a prompt that are on the CPU at a time.
_SCORED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Logprobs of a prompt's known tokens, and whether its logits were finite."""

    logprobs: tuple[TokenLogprob, ...] = ()
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """An enqueued step. When `wait` returns, `results` has a row for each segment of `sampled`, in order, and
    `logits` those that the CPU reads, by segment."""

    plan: StepPlan
    outputs: Sequence[SegmentOutput]
    sampled: Sequence[int]
    scored: dict[int, _Scored]
    results: Tensor
    logits: dict[int, Tensor]
    wait: Callable[[], None]


class CudaExecutor:
    """`runtime.protocol.Executor` with `caps.max_in_flight` steps enqueued. Without graphs (`add_graphs`) all
    steps are launched. Of the ways to run a step, `demanded` may not be given up."""

    def __init__(
        self,
        model: CudaModel,
        rows: DeviceRows,
        caps: ExecutorCaps,
        device: Device,
        *,
        sampler: DeviceSampler,
        space: SampleSpace,
        results: Tensor,
        demanded: Collection[str] = (),
    ) -> None:
        self._model, self._rows, self._caps, self._device = model, rows, caps, device
        self._sampler, self._space, self._results = sampler, space, results
        self._graphs: StepGraphs | None = None
        self._replays = False
        self._ways = {LISTS: LISTS in demanded} if model.has_lists else {}
        self._demanded = demanded
        self._listed_sampler = ListedSampler(model, rows.tables, space) if model.has_lists else None
        # Staging memory of a step is used again only after the step was collected.
        self._slots = range(caps.max_in_flight + 1)
        self._controls: list[Tensor] = []
        self._arrived = [device.staging(tuple(results.shape), torch.int32) for _ in self._slots]
        self._flights: dict[Ticket, _Flight] = {}
        self._num_tickets = 0
        self._is_open = True
        self._draft_model: DraftModel | None = None
        self.num_replayed = 0
        self.num_launched = 0

    @property
    def caps(self) -> ExecutorCaps:
        return self._caps

    @property
    def launched(self) -> CudaModel:
        """What launched steps are enqueued by."""
        return self._model

    def add_graphs(self, make: Callable[[], StepGraphs]) -> None:
        """Replays steps from now on. Where they cannot be recorded and need not be, it says so, and goes
        without them."""
        try:
            self._graphs = make()
        except DeviceLostError:
            raise
        except (LlmcError, RuntimeError) as error:  # torch's own are RuntimeErrors
            if GRAPHS in self._demanded:
                raise
            self.give_up(GRAPHS, f"Recording failed: {error}")
            return
        self._ways[GRAPHS] = GRAPHS in self._demanded
        self._replays = True
        shape = tuple(self._graphs.inputs.control.shape)
        self._controls = [self._device.staging(shape, torch.int32) for _ in self._slots]

    @property
    def ways(self) -> Mapping[str, bool]:
        """`runtime.proof.Provable`: recorded steps and lists, those that there are."""
        return dict(self._ways)

    def run_by(self, ways: Collection[str]) -> None:
        with suppress(DeviceLostError):  # whoever waited for these steps was told
            for flight in self._flights.values():
                flight.wait()
        self._flights.clear()
        self._rows.leave(tuple(self._rows.rows))
        self._replays = GRAPHS in ways and self._graphs is not None
        self._model.uses_lists = LISTS in ways and self._model.has_lists

    def give_up(self, way: str, reason: str) -> None:
        self._ways.pop(way, None)
        if way == GRAPHS:
            graphs, self._graphs, self._replays = self._graphs, None, False
            if graphs is not None:
                graphs.close()
        logging.getLogger("llmc.runtime").warning(
            "The GPU runs without %s, slower and with the same tokens. %s Report this with the model, the "
            "GPU and its driver; %s=off says that it is known.",
            *(way, reason, _SETTINGS[way]),
        )
        self._caps = replace(self._caps, details={**self._caps.details, way: f"given up: {reason}"})

    @property
    def model(self) -> StepModel:
        """The model without rows on the device, sampled by the oracle."""
        return OracleSampled(self._model)

    def attach(self, draft_model: DraftModel) -> None:
        """Proposes with `draft_model` from now on, and closes it with itself. Before the first row enters."""
        _expect(not self._rows.rows, "a draft model comes after the first row")
        self._draft_model = draft_model
        self._caps = replace(self._caps, can_propose=True)

    def apply(self, diff: RowDiff) -> None:
        if self._draft_model is not None:
            self._draft_model.apply(diff)
        self._rows.leave(diff.leave)
        with self._device.scope():
            for entry in diff.enter:
                _expect(entry.row not in self._rows.rows, f"row {entry.row} is taken")
                self._rows.enter(entry)

    def submit(self, plan: StepPlan) -> Ticket:
        _expect(self._is_open, "the executor was closed")
        _expect(len(self._flights) < self._caps.max_in_flight, "too many steps are in flight")
        _expect(plan.num_tokens <= self._caps.max_tokens, f"{plan.num_tokens} tokens are too many for a step")
        for segment in plan.segments:
            _expect(segment.row in self._rows.rows, f"row {segment.row} is empty")
        with self._device.scope():
            self._rows.change(plan.block_changes)
            self._model.copy_pages(plan.block_copies)
            outputs = [SegmentOutput(each, self._rows.rows[each.row]) for each in plan.segments]
            bucket = self._bucket(plan, outputs)
            slot = self._num_tickets % len(self._arrived)
            if bucket is None:
                flight = self._launch(plan, outputs, self._arrived[slot])
            else:
                flight = self._replay(plan, outputs, bucket, slot)
        for output in outputs:
            if output.samples and not output.segment.draft_ids:
                output.row.token_ids.append(UNKNOWN)
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets)
        self._flights[ticket] = flight
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        _expect(ticket in self._flights and ticket == min(self._flights), f"step {ticket} is not the oldest")
        flight = self._flights.pop(ticket)
        flight.wait()
        given: list[list[int]] = flight.results.tolist()
        found = dict(zip(flight.sampled, given, strict=True))
        results = tuple(self._result(flight, index, found.get(index)) for index in range(len(flight.outputs)))
        return StepResult(step_id=flight.plan.step_id, epoch=flight.plan.epoch, rows=results)

    def propose(self, rows: Sequence[int], k: int) -> Drafts:
        _expect(self._draft_model is not None, "there is no draft model to propose with")
        assert self._draft_model is not None
        known = [(row, self._rows.rows[row].token_ids) for row in rows]
        return Drafts(token_ids=self._draft_model.propose(known, k))

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with suppress(DeviceLostError):  # nothing to wait for, and nothing to give back
            for flight in self._flights.values():
                flight.wait()
            if self._graphs is not None:
                self._graphs.close()
        self._flights.clear()
        self._model.close()
        if self._draft_model is not None:
            self._draft_model.close()

    def _bucket(self, plan: StepPlan, outputs: Sequence[SegmentOutput]) -> int | None:
        """The tokens of the graph that runs a step; None where it has to be launched. Logprobs of prompts
        are read while a step runs."""
        if (
            not self._replays
            or self._graphs is None
            or not outputs
            or any(output.scores_prompt for output in outputs)
        ):
            return None
        return self._graphs.bucket(plan.num_tokens, keys_read_again(outputs))

    def _replay(self, plan: StepPlan, outputs: Sequence[SegmentOutput], bucket: int, slot: int) -> _Flight:
        """Enqueue a recorded step: one small copy, one call."""
        assert self._graphs is not None
        inputs, control = self._graphs.inputs, self._controls[slot]
        graph = self._graphs.graph(bucket, filters(outputs))
        mask = plan.grammar_mask
        places = write_control(control.numpy(), outputs, has_masks=mask is not None)
        if mask is not None:
            self._device.put(_as_int32(mask), inputs.masks[: len(mask)])
        self._device.copy(control, inputs.control)
        graph.recorded.replay()
        self.num_replayed += 1
        arrived = self._arrived[slot][: len(places)]
        self._device.copy(self._results[: len(places)], arrived)
        wanted = {index: tokens for index, tokens in places.items() if _wants_logprobs(outputs[index])}
        return _Flight(
            plan=plan,
            outputs=outputs,
            sampled=tuple(places),
            scored={},
            results=arrived,
            logits=self._read_logits(graph.logits, wanted),
            wait=self._device.mark(),
        )

    def _launch(self, plan: StepPlan, outputs: Sequence[SegmentOutput], arrived: Tensor) -> _Flight:
        """Enqueue a step kernel by kernel."""
        owners = [each.segment.row for each in outputs for _ in each.token_ids]
        unknown = any(UNKNOWN in each.token_ids for each in outputs)

        def fill(ids: Tensor) -> None:
            if unknown:
                rows = self._device.sent(np.asarray(owners, np.int32))
                self._sampler.fill_ids(ids, rows, self._rows.tables.state)

        logits = self._model.forward([each.sequence for each in outputs], fill)
        self.num_launched += 1
        found = samples_of(outputs, plan.masks(), self._device)
        scored = self._scores(outputs, logits)
        read: dict[int, Tensor] = {}
        segments: Sequence[int] = ()
        if found is not None:
            assert logits is not None
            rows = logits
            if len(found.places) != len(logits):
                rows = logits.index_select(0, self._device.sent(np.asarray(found.places)))
            count, segments = len(found.segments), found.segments
            self._sample(rows, found.samples, self._results[:count], filtered=filters(outputs))
            self._device.copy(self._results[:count], arrived[:count])
            read = self._read_logits(rows, _sampled_places(outputs))
        return _Flight(
            plan=plan,
            outputs=outputs,
            sampled=segments,
            scored=scored,
            results=arrived[: len(segments)],
            logits=read,
            wait=self._device.mark(),
        )

    def _sample(self, logits: Tensor, samples: Samples, results: Tensor, *, filtered: bool) -> None:
        """Samples a launched step, in the executor's own space where it is large enough, which is but for
        long drafts."""
        is_usual = len(logits) <= len(self._space.shaped)
        if is_usual and self._listed_sampler is not None and self._model.uses_lists:
            self._listed_sampler.sample(logits, samples, results, self._device.stream, filtered=filtered)
            return
        space = self._space if is_usual else make_space(self._device.zeros, *logits.shape)
        self._sampler.sample(logits, samples, self._rows.tables, space, results, filtered=filtered)

    def _read_logits(self, logits: Tensor, wanted: dict[int, list[int]]) -> dict[int, Tensor]:
        """Copies of the logits of segments, on their way to the CPU."""
        read: dict[int, Tensor] = {}
        for index, places in wanted.items():
            read[index] = self._device.staging((len(places), logits.shape[1]), torch.float32)
            self._device.copy(logits[places[0] : places[-1] + 1].float(), read[index])
        return read

    def _scores(self, outputs: Sequence[SegmentOutput], logits: Tensor | None) -> dict[int, _Scored]:
        """Logprobs of prompts, before anything is sampled: logits are read a few at a time, and waited
        for."""
        scored: dict[int, _Scored] = {}
        place = 0
        for index, output in enumerate(outputs):
            if output.scores_prompt:
                assert logits is not None
                rows = [
                    (place + offset, output.following(token)) for offset, token in enumerate(output.wanted)
                ]
                scored[index] = _scored(logits, rows, output.row.entry.sampling.logprobs or 0)
            place += len(output.wanted)
        return scored

    def _result(self, flight: _Flight, index: int, found: list[int] | None) -> RowResult:
        """What a segment gave, and its row's tokens."""
        output = flight.outputs[index]
        row, scored = output.segment.row, flight.scored.get(index, _Scored())
        if found is None or not scored.finite:
            return RowResult(row=row, prompt_logprobs=scored.logprobs, finite=scored.finite)
        if found[0] < 0:
            return RowResult(row=row, finite=False)
        tokens = tuple(found[1 : 1 + found[0]])
        known = output.segment.start + output.first_sample + 1
        output.row.token_ids[known : known + (0 if output.segment.draft_ids else 1)] = tokens
        logprobs: tuple[TokenLogprob, ...] = ()
        if index in flight.logits:
            num_top = output.row.entry.sampling.logprobs or 0
            rows = flight.logits[index].numpy()
            logprobs = tuple(
                token_logprob(logits, token, num_top) for logits, token in zip(rows, tokens, strict=False)
            )
        return RowResult(
            row=row,
            token_ids=tokens,
            num_accepted=len(tokens) - 1,
            logprobs=logprobs,
            prompt_logprobs=scored.logprobs,
        )


def _wants_logprobs(output: SegmentOutput) -> bool:
    return output.samples and output.row.entry.sampling.logprobs is not None


def _sampled_places(outputs: Sequence[SegmentOutput]) -> dict[int, list[int]]:
    """Of segments that want logprobs, the places of their samples among all samples."""
    wanted: dict[int, list[int]] = {}
    place = 0
    for index, output in enumerate(outputs):
        count = 1 + len(output.segment.draft_ids) if output.samples else 0
        if _wants_logprobs(output):
            wanted[index] = list(range(place, place + count))
        place += count
    return wanted


def _scored(logits: Tensor, rows: Sequence[tuple[int, int | None]], num_top: int) -> _Scored:
    logprobs: list[TokenLogprob] = []
    for start in range(0, len(rows), _SCORED_ROWS):
        part = rows[start : start + _SCORED_ROWS]
        values = logits[part[0][0] : part[-1][0] + 1].float().cpu().numpy()
        for row, (_, following) in zip(values, part, strict=True):
            if not is_finite(row):
                return _Scored(finite=False)
            if following is not None:
                logprobs.append(token_logprob(row, following, num_top))
    return _Scored(logprobs=tuple(logprobs))


def _as_int32(mask: NDArray[np.uint32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(mask).view(np.int32)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InternalError(
            "runtime.step_contract",
            "The engine asked the executor for something that makes no sense.",
            f"The contract between the two was broken: {what}.",
            "Report this with the request mix that led to it.",
        )
