"""Which logit rows of a launched step are sampled for whom, in the words of the sampling kernels. Knows
segments; no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.cuda.sampler import Samples
from .rows import SegmentOutput

Mask = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """`samples` of logit rows `places` of a step; `segments` are those that sample, in order."""

    samples: Samples
    places: Sequence[int]
    segments: Sequence[int]


def samples_of(
    outputs: Sequence[SegmentOutput], masks: Sequence[Mask | None], device: str
) -> SampledRows | None:
    """What `outputs` sample, where the wanted logits of each come in their order; None for nothing."""
    places: list[int] = []
    segments: list[int] = []
    columns: dict[str, list[int]] = {name: [] for name in ("row_of", "ahead", "drafts", "first", "count")}
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
    mask_of = np.arange(len(places)) if allowed else np.full(len(places), -1)
    sent = {name: _sent(np.asarray(column), device) for name, column in columns.items()}
    words = np.concatenate(allowed) if allowed else np.zeros((1, 1), np.uint32)
    samples = Samples(
        row_of=sent["row_of"],
        ahead=sent["ahead"],
        drafts=sent["drafts"],
        first=sent["first"],
        count=sent["count"],
        mask_of=_sent(mask_of, device),
        masks=torch.from_numpy(np.ascontiguousarray(words).view(np.int32)).to(device),
    )
    return SampledRows(samples=samples, places=places, segments=segments)


def filters(outputs: Sequence[SegmentOutput]) -> bool:
    """Whether top_k or top_p may change a token of any of them."""
    sampled = (output.row.entry.sampling for output in outputs if output.samples)
    return any(each.temperature and (each.top_k > 0 or each.top_p < 1.0) for each in sampled)


def _sent(values: NDArray[np.int64], device: str) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device)
