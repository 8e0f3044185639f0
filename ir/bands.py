"""Work on large matrices in bands of rows, a thread a band. Knows no operator."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

# Values of one band: its float32 copies stay in the caches of a core.
BAND_VALUES = 1 << 19
Result = TypeVar("Result")


def map_bands(work: Callable[[slice], Result], num_rows: int, width: int, multiple: int = 1) -> list[Result]:
    """`work(rows)` for consecutive slices of `num_rows` rows of `width` values, in order. Slices start at
    multiples of `multiple` rows.

    As many bands run at once as torch has threads, each on one: sharing each of many short loops among
    threads costs more than it gains, and on a busy machine many times more.
    """
    multiple = max(1, multiple)
    size = max(1, BAND_VALUES // max(1, width) // multiple) * multiple
    bands = [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
    threads = torch.get_num_threads()
    if threads == 1 or len(bands) < 2:
        with one_thread():
            return [work(band) for band in bands]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, bands))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Generator[None]:
    """Lets torch use one thread for what is too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
