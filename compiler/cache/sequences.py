"""Token sequences in the compile cache: what calibration was prepared from the same inputs before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        key = cache.key("sequences", cache.files_digest([ROOT / name for name in code]), *inputs())
    except (Uncachable, OSError) as reason:
        cache.note(f"{label} is not kept: {reason}")
        return RecalledSequences(compute(), False)
    kept = cache.kept_bytes(_KIND, key, label, lambda: msgspec.msgpack.encode(compute()))
    return RecalledSequences(msgspec.msgpack.decode(kept.data, type=Sequences), kept.cached)
