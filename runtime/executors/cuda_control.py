"""What a recorded step is told: of each of its tokens whose it is, where it stands and what is sampled behind
it, as one array of integers. Knows segments; no device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .rows import SegmentOutput

# Rows of the array. Of a token: the row of its request, itself (negative: the row's last one, which the CPU
# may not have seen) and its position; the row that is sampled behind it (negative: none), how many drafts
# stand before, which one follows, and its row of masks, as `kernels.cuda.sampler.Samples` has them. Of a
# segment that samples: its first token with a sample, and how many there are.
ROW, TOKEN, POSITION, SAMPLED, AHEAD, DRAFT, MASK, FIRST, COUNT = range(9)
FIELDS = 9


def write_control(
    control: NDArray[np.int32], outputs: Sequence[SegmentOutput], *, has_masks: bool
) -> dict[int, list[int]]:
    """Fill `control[FIELDS, tokens]` with a step's `outputs`; tokens behind theirs are nobody's. The tokens
    that each segment samples behind, by segment, in order.

    With masks, a segment has one for each of its samples and at least one, in the order of segments.
    """
    columns: list[list[int]] = [[] for _ in range(FIELDS)]
    row, token, position, sampled, ahead, draft, mask, first, count = columns
    places: dict[int, list[int]] = {}
    num_masks = 0
    for index, output in enumerate(outputs):
        segment, size = output.segment, len(output.token_ids)
        num_samples = size - output.first_sample if output.samples else 0
        silent = size - num_samples
        start = len(row)
        row += [segment.row] * size
        token += output.token_ids
        position += range(segment.start, segment.start + size)
        sampled += [-1] * silent + [segment.row] * num_samples
        ahead += [0] * silent + list(range(num_samples))
        draft += [-1] * silent + ([*segment.draft_ids, -1] if num_samples else [])
        masks = range(num_masks, num_masks + num_samples) if has_masks else [-1] * num_samples
        mask += [*([-1] * silent), *masks]
        num_masks += max(1, num_samples)
        if num_samples:
            places[index] = list(range(start + silent, start + size))
            first.append(start + silent)
            count.append(num_samples)
    control.fill(-1)
    control[[AHEAD, FIRST, COUNT]] = 0
    for field, column in enumerate(columns):
        control[field, : len(column)] = column
    return places


def keys_read_again(outputs: Sequence[SegmentOutput]) -> int:
    """Cached tokens that are read more than once when each token of a step attends by itself, and once when
    those of a segment attend together."""
    sizes = [(len(output.token_ids), output.segment.start) for output in outputs]
    return sum((size - 1) * (start + size) for size, start in sizes)
