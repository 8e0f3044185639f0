"""Documents of plain text, and the packed token batches made of them.

Knows the end-of-text marker and how documents are joined; knows no model and no tokenizer's inside.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"

_OPENERS: dict[str, Callable[..., object]] = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, plain or packed as .xz or .gz, each ended by a line `<|endoftext|>`.

    Raises ValueError when the file holds no document.
    """
    opener = _OPENERS.get(path.suffix, open)
    with cast(IO[str], opener(path, "rt", encoding="utf-8")) as file:
        documents = [piece.strip("\n") for piece in file.read().split(END_OF_TEXT)]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path} holds no document")
    return documents


def pack(encoded: Sequence[NDArray[np.int64]], width: int) -> NDArray[np.int64]:
    """The documents end to end, cut into rows int64 `[rows, width + 1]`; a row's last token is the next
    row's first, so that every token but the first is predicted once. The tail that fills no row is left out.

    Raises ValueError when there is not even one row.
    """
    stream = np.concatenate(encoded)
    num_rows = (len(stream) - 1) // width
    if num_rows < 1:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {width + 1}")
    starts = np.arange(num_rows) * width
    return stream[starts[:, None] + np.arange(width + 1)]


def batches(
    encoded: Sequence[NDArray[np.int64]], width: int, batch: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Endless batches int64 `[batch, width + 1]`. Each epoch shuffles the documents, shifts where rows
    begin, and shuffles the rows."""
    waiting = np.empty((0, width + 1), dtype=np.int64)
    while True:
        while len(waiting) < batch:
            order = rng.permutation(len(encoded))
            stream = np.concatenate([encoded[index] for index in order])
            shift = int(rng.integers(min(width, max(1, len(stream) - width))))
            rows = pack([stream[shift:]], width)
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        yield waiting[:batch]
        waiting = waiting[batch:]
