"""Decode steps as graphs: everything between one token and the next (where a row stands, the model, sampling,
what becomes of it) recorded once for a number of rows, and replayed by one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...artifact.cuda import ArenaPlan
from ...ir.paged import QUERY_STARTS, block_table_name, slots_name
from ...kernels.cuda.launch import Launcher
from ...kernels.cuda.sampler import DeviceSampler, RowTables, Samples, SampleSpace
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
class DecodeGraph:
    """A recorded step of up to `rows` rows; its logits `[rows, V]` stand at `logits` until the next step."""

    recorded: Replayable
    logits: Tensor


class DecodeInputs:
    """The fixed places that recorded steps of up to `most` rows read and write.

    `control` is int32 `[2, most]`: the row of each sequence, and its row of `masks`; negative for none.
    """

    def __init__(self, device: Device, tables: RowTables, pages: Sequence[int], most: int) -> None:
        width = -(-most // 4) * 4  # the second row starts at a multiple of 16 bytes
        zeros = device.zeros
        self.control = zeros((2, width), "int32")
        self.ids, self.positions = zeros((most,), "int64"), zeros((most,), "int64")
        self.counting = torch.arange(most + 1, dtype=torch.int64, device=device.name)
        self.groups = [
            (zeros((most, table.shape[1]), "int64"), zeros((most,), "int64"), page)
            for table, page in zip(tables.tables, pages, strict=True)
        ]
        self.masks = zeros((most, tables.banned.shape[1]), "int32")
        self._first = torch.arange(most, dtype=torch.int32, device=device.name)
        self._one, self._none = self._first * 0 + 1, self._first * 0
        self._no_draft = self._none - 1

    def graph_inputs(self, rows: int) -> dict[str, Tensor]:
        """The program's inputs for `rows` sequences of a token each."""
        inputs = {"input_ids": self.ids[:rows], "positions": self.positions[:rows]}
        inputs |= {"out_rows": self.counting[:rows], QUERY_STARTS: self.counting[: rows + 1]}
        for index, (table, slots, _) in enumerate(self.groups):
            inputs |= {block_table_name(index): table[:rows], slots_name(index): slots[:rows]}
        return inputs

    def samples(self, rows: int) -> Samples:
        """One sample for each of `rows` sequences."""
        return Samples(
            row_of=self.control[0, :rows],
            ahead=self._none[:rows],
            drafts=self._no_draft[:rows],
            mask_of=self.control[1, :rows],
            masks=self.masks,
            first=self._first[:rows],
            count=self._one[:rows],
        )


class DecodeGraphs:
    """Recorded decode steps by number of rows and by whether top_k or top_p may occur; made when they are
    first wanted. All work in one arena."""

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
    ) -> None:
        self._plans = {plan.rows: plan for plan in plans}
        self.buckets = tuple(sorted(self._plans))
        self.inputs = DecodeInputs(
            device, tables, [group.page_tokens for group in model.layout.groups], self.buckets[-1]
        )
        self._model, self._tables, self._space, self._results = model, tables, space, results
        self._device, self._recorder = device, recorder
        self._arena = device.zeros((max(plan.num_bytes for plan in plans),), "uint8")
        self._sampler = DeviceSampler(launcher)
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}

    def bucket(self, rows: int) -> int | None:
        """The smallest recorded or recordable number of rows that holds `rows`."""
        return next((bucket for bucket in self.buckets if bucket >= rows), None)

    def graph(self, bucket: int, filtered: bool) -> DecodeGraph:
        """The step of `bucket` rows, recorded when it is first asked for."""
        key = (bucket, filtered)
        if key not in self._graphs:
            self._graphs[key] = self._record(bucket, filtered)
        return self._graphs[key]

    def close(self) -> None:
        """Give the graphs back. Idempotent."""
        for graph in self._graphs.values():
            graph.recorded.close()
        self._graphs.clear()

    def _record(self, bucket: int, filtered: bool) -> DecodeGraph:
        empty = Arena(self._arena, self._plans[bucket].offsets).empty
        operators = self._model.operators(empty)
        inputs, samples = self.inputs.graph_inputs(bucket), self.inputs.samples(bucket)
        groups = [(table[:bucket], slots[:bucket], page) for table, slots, page in self.inputs.groups]
        logits: list[Tensor] = []

        def work() -> None:
            self._sampler.open_decode(
                samples.row_of, self._tables, inputs["input_ids"], inputs["positions"], groups
            )
            logits.append(self._model.decode(inputs, operators))
            results = self._results[:bucket]
            self._sampler.sample(logits[0], samples, self._tables, self._space, results, filtered=filtered)

        with self._device.scope(), self._device.own_memory():
            recorded = self._recorder(work)
        return DecodeGraph(recorded, logits[0])
