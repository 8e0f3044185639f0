"""Steps as graphs: everything between two steps (where tokens stand, the model, sampling, what becomes of the
samples) recorded once for a number of tokens, and replayed by one call, whosever they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...artifact.cuda import ArenaPlan
from ...ir.paged import QUERY_STARTS, block_table_name, slots_name
from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.sampler import DeviceSampler, RowTables, Samples, SampleSpace
from ...spec.plans import CapturePlan
from . import cuda_control
from .cuda_arena import Arena
from .cuda_device import Device
from .cuda_model import CudaModel


class Replayable(Protocol):
    """Recorded launches."""

    def replay(self) -> None: ...

    def close(self) -> None: ...


# Records what a call enqueues on the device's stream, without carrying it out.
Recorder = Callable[[Callable[[], None]], Replayable]


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A recorded step of up to `T` tokens; its logits `[T, V]` stand at `logits` until the next step."""

    recorded: Replayable
    logits: Tensor


class StepInputs:
    """The fixed places that recorded steps of up to `most` tokens read and write. `control` is what
    `cuda_control` says; each token is a sequence of its own."""

    def __init__(self, device: Device, tables: RowTables, pages: Sequence[int], most: int) -> None:
        width = -(-most // 4) * 4  # every row of it starts at a multiple of 16 bytes
        zeros = device.zeros
        self.control = zeros((cuda_control.FIELDS, width), "int32")
        self.ids, self.positions = zeros((most,), "int64"), zeros((most,), "int64")
        self.counting = torch.arange(most + 1, dtype=torch.int64, device=device.name)
        self.groups = [
            (zeros((most, table.shape[1]), "int64"), zeros((most,), "int64"), page)
            for table, page in zip(tables.tables, pages, strict=True)
        ]
        self.masks = zeros((most, tables.banned.shape[1]), "int32")

    def graph_inputs(self, tokens: int) -> dict[str, Tensor]:
        """The program's inputs for `tokens` sequences of a token each."""
        inputs = {"input_ids": self.ids[:tokens], "positions": self.positions[:tokens]}
        inputs |= {"out_rows": self.counting[:tokens], QUERY_STARTS: self.counting[: tokens + 1]}
        for index, (table, slots, _) in enumerate(self.groups):
            inputs |= {block_table_name(index): table[:tokens], slots_name(index): slots[:tokens]}
        return inputs

    def given(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, id and position of each of `tokens`."""
        control = self.control[:, :tokens]
        return control[cuda_control.ROW], control[cuda_control.TOKEN], control[cuda_control.POSITION]

    def samples(self, tokens: int) -> Samples:
        """What is sampled behind `tokens`."""
        control = self.control[:, :tokens]
        return Samples(
            row_of=control[cuda_control.SAMPLED],
            ahead=control[cuda_control.AHEAD],
            drafts=control[cuda_control.DRAFT],
            mask_of=control[cuda_control.MASK],
            masks=self.masks,
            first=control[cuda_control.FIRST],
            count=control[cuda_control.COUNT],
        )


class StepGraphs:
    """Recorded steps by number of tokens and by whether top_k or top_p may occur, made when they are first
    wanted; as many of `capture.at_load` as its time allows, now. All work in one arena."""

    def __init__(
        self,
        model: CudaModel,
        tables: RowTables,
        space: SampleSpace,
        results: Tensor,
        *,
        device: Device,
        launcher: Launcher,
        recorder: Recorder,
        plans: Sequence[ArenaPlan],
        capture: CapturePlan,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._plans = {plan.rows: plan for plan in plans}
        self.buckets = tuple(sorted(self._plans))
        self.inputs = StepInputs(
            device, tables, [group.page_tokens for group in model.layout.groups], self.buckets[-1]
        )
        self._model, self._tables, self._space, self._results = model, tables, space, results
        self._device, self._recorder = device, recorder
        self._memory = device.zeros((max(plan.num_bytes for plan in plans),), "uint8")
        self._arena: Arena | None = None  # of the step that is being recorded
        self._graph = model.graph_by(model.operators(self._empty))
        self._sampler = DeviceSampler(launcher)
        self._keys_read_again = capture.keys_read_again
        self._graphs: dict[tuple[int, bool], StepGraph] = {}
        self._launch_for_nobody()
        ends_s = clock() + capture.load_seconds
        for bucket in sorted(set(self.buckets) & set(capture.at_load)):
            if clock() < ends_s:
                self.graph(bucket, filtered=False)

    @property
    def num_recorded(self) -> int:
        """Graphs that were made so far."""
        return len(self._graphs)

    def bucket(self, tokens: int, keys_read_again: int) -> int | None:
        """The smallest number of tokens of a graph that holds `tokens`. None where there is none, or the plan
        says that reading so many keys again takes longer than launching the step."""
        if keys_read_again > self._keys_read_again:
            return None
        return next((bucket for bucket in self.buckets if bucket >= tokens), None)

    def graph(self, bucket: int, filtered: bool) -> StepGraph:
        """The step of `bucket` tokens, recorded when it is first asked for."""
        key = (bucket, filtered)
        if key not in self._graphs:
            self._graphs[key] = self._record(bucket, filtered)
        return self._graphs[key]

    def close(self) -> None:
        """Give the graphs back. Idempotent."""
        for graph in self._graphs.values():
            graph.recorded.close()
        self._graphs.clear()

    def _launch_for_nobody(self) -> None:
        """A step that nobody notices: what torch and the driver prepare when a kernel is first launched, they
        cannot while a step is recorded."""
        self._device.settle()  # everything above was made on another stream
        with self._device.scope():
            control = self.inputs.control.fill_(-1)
            control[[cuda_control.AHEAD, cuda_control.FIRST, cuda_control.COUNT]] = 0
            self._logits(self.buckets[0])
        self._device.settle()

    def _record(self, bucket: int, filtered: bool) -> StepGraph:
        samples, results = self.inputs.samples(bucket), self._results[:bucket]
        logits: list[Tensor] = []

        def work() -> None:
            logits.append(self._logits(bucket))
            self._sampler.sample(logits[0], samples, self._tables, self._space, results, filtered=filtered)

        self._arena = Arena(self._memory, self._plans[bucket].offsets)
        try:
            with self._device.scope(), self._device.own_memory():
                recorded = self._recorder(work)
        finally:
            self._arena = None
        return StepGraph(recorded, logits[0])

    def _empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        """`kernels.cuda.products.Empty`: in the arena while a step is recorded."""
        if self._arena is not None:
            return self._arena.empty(like, shape, dtype)
        return like.new_empty(shape, dtype=dtype or like.dtype)

    def _logits(self, tokens: int) -> Tensor:
        """Enqueues the step of so many tokens up to its logits."""
        inputs = self.inputs.graph_inputs(tokens)
        groups = [(table[:tokens], slots[:tokens], page) for table, slots, page in self.inputs.groups]
        ids, positions = inputs["input_ids"], inputs["positions"]
        self._sampler.open_step(self.inputs.given(tokens), self._tables, ids, positions, groups)
        return self._model.compute(self._graph, inputs)
