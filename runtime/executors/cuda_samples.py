"""Which logit rows of a launched step are sampled for whom, in the words of the sampling kernels. Knows
segments; no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.cuda.sampler import Samples
from .cuda_device import Device
from .rows import SegmentOutput

Mask = NDArray[np.uint32]

_COLUMNS = ("row_of", "ahead", "drafts", "first", "count", "mask_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """`samples` of logit rows `places` of a step; `segments` are those that sample, in order."""

    samples: Samples
    places: Sequence[int]
    segments: Sequence[int]


def samples_of(
    outputs: Sequence[SegmentOutput], masks: Sequence[Mask | None], device: Device
) -> SampledRows | None:
    """What `outputs` sample, where the wanted logits of each come in their order; None for nothing."""
    places: list[int] = []
    segments: list[int] = []
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    allowed: list[Mask] = []
    place = 0
    for index, (output, mask) in enumerate(zip(outputs, masks, strict=True)):
        if output.samples:
            drafts = output.segment.draft_ids
            segments.append(index)
            columns["first"].append(len(places))
            columns["count"].append(1 + len(drafts))
            columns["row_of"] += [output.segment.row] * (1 + len(drafts))
            columns["ahead"] += range(1 + len(drafts))
            columns["drafts"] += [*drafts, -1]
            places += [
                place + offset for offset, token in enumerate(output.wanted) if token >= output.first_sample
            ]
            if mask is not None:
                allowed.append(mask)
        place += len(output.wanted)
    if not segments:
        return None
    columns["mask_of"] = list(range(len(places))) if allowed else [-1] * len(places)
    words = np.concatenate(allowed) if allowed else np.zeros((1, 1), np.uint32)
    samples = Samples(**_sent(columns, device), masks=device.sent(np.ascontiguousarray(words).view(np.int32)))
    return SampledRows(samples=samples, places=places, segments=segments)


def _sent(columns: Mapping[str, Sequence[int]], device: Device) -> dict[str, Tensor]:
    """`columns` on the device by one copy, each beginning at a multiple of 16 bytes."""
    width = -(-max(map(len, columns.values())) // 4) * 4
    packed = np.zeros((len(columns), width), np.int32)
    for row, column in zip(packed, columns.values(), strict=True):
        row[: len(column)] = column
    sent = device.sent(packed)
    return {name: sent[index, : len(column)] for index, (name, column) in enumerate(columns.items())}


def filters(outputs: Sequence[SegmentOutput]) -> bool:
    """Whether top_k or top_p may change a token of any of them."""
    sampled = (output.row.entry.sampling for output in outputs if output.samples)
    return any(each.temperature and (each.top_k > 0 or each.top_p < 1.0) for each in sampled)
