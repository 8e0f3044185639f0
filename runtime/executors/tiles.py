"""A step's sequences, cut into tiles that a model can run. Knows tokens, pages and rows; no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray


class SequencePart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence's part in a step: what `ir.paged.PagedSequence` is, without torch.

    `token_ids` stand at positions `start`, `start + 1`, ...; `block_tables[g][i]` is the page of group g
    that holds positions `i * page_tokens` on, -1 where it was given back; `wanted` lists the tokens of this
    step (0 is the first) whose logits are asked for.
    """

    start: int
    token_ids: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    wanted: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLogits:
    """Logits `[n, vocab]` of one tile, float32: row i belongs to `owners[i]` = (sequence of the step, token
    of that sequence's part in the step)."""

    owners: tuple[tuple[int, int], ...]
    logits: NDArray[np.float32]


def split_tiles(sequences: Sequence[SequencePart], size: int) -> list[list[tuple[int, int, SequencePart]]]:
    """Cuts a step into tiles of at most `size` tokens, in order.

    Each entry is (index of the sequence, tokens of it that lie in earlier tiles, its part in this tile).
    """
    tiles: list[list[tuple[int, int, SequencePart]]] = [[]]
    free = size
    for index, sequence in enumerate(sequences):
        if 0 < len(sequence.token_ids) <= free:
            tiles[-1].append((index, 0, sequence))
            free -= len(sequence.token_ids)
            continue
        offset = 0
        while offset < len(sequence.token_ids):
            if free == 0:
                tiles.append([])
                free = size
            count = min(free, len(sequence.token_ids) - offset)
            part = msgspec.structs.replace(
                sequence,
                start=sequence.start + offset,
                token_ids=sequence.token_ids[offset : offset + count],
                wanted=[token - offset for token in sequence.wanted if offset <= token < offset + count],
            )
            tiles[-1].append((index, offset, part))
            offset += count
            free -= count
    return tiles
