"""Token sequences in the compile cache: what calibration was prepared from the same inputs before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from .digest import Uncachable
from .session import CompileCache
from .sources import ROOT

_KIND = "calibration"
Sequences = tuple[tuple[int, ...], ...]


class RecalledSequences(NamedTuple):
    """Sequences, and whether they were known."""

    sequences: Sequences
    cached: bool


def recall_sequences(
    cache: CompileCache,
    code: Sequence[str],
    inputs: Callable[[], tuple[object, ...]],
    label: str,
    compute: Callable[[], Sequences],
) -> RecalledSequences:
    """The sequences that `compute` makes by the modules `code` (paths within the package) of `inputs()`,
    which must be all they depend on. What cannot be told by content, or read, is computed and not kept."""
    if not cache.is_on:
        return RecalledSequences(compute(), False)
    try:
        key = cache.key(_KIND, cache.files_digest([ROOT / name for name in code]), *inputs())
    except (Uncachable, OSError) as reason:
        cache.note(f"{label} is not kept: {reason}")
        return RecalledSequences(compute(), False)
    folder = cache.store.find(_KIND, key)
    if folder is not None:
        return RecalledSequences(_decoded((folder / "tokens").read_bytes()), True)
    started = cache.clock()
    computed = compute()
    data = msgspec.msgpack.encode(computed)
    seconds = cache.clock() - started
    cache.store.keep(_KIND, key, label, lambda making: _write(making / "tokens", data), seconds=seconds)
    return RecalledSequences(computed, False)


def _decoded(data: bytes) -> Sequences:
    return msgspec.msgpack.decode(data, type=tuple[tuple[int, ...], ...])


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
