"""What GroupQueryAttention can take over from the operators before it: the rotation of q and k, and cutting
q, k and v out of one product. Decides from the program alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ....spec.model import ModelSpec

# A table of angles is made when the model is loaded; of longer contexts angles are computed in each step.
_MOST_TABLE_BYTES = 128 * 2**20
_VIEWS = ("aten.reshape.default", "aten.view.default")


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotation that queries and keys both go through, and what they were before it."""

    q: fx.Node
    k: fx.Node
    inv_freq: fx.Node
    scale: float
    style: str


def rotary_of(q: fx.Node, k: fx.Node, spec: ModelSpec) -> Rotary | None:
    """The rotation of `q` and `k` (`[T, heads, D]`), where the operator can do it: both are rotated by the
    positions and one stored table, from their first element on, and the table of all positions is not too
    large."""
    if not (_is(q, "llmc.rope.default") and _is(k, "llmc.rope.default") and q.args[1:] == k.args[1:]):
        return None
    source, positions, inv_freq, scale, style, tail = q.args
    before = k.args[0]
    assert isinstance(source, fx.Node)
    assert isinstance(before, fx.Node)
    assert isinstance(positions, fx.Node)
    assert isinstance(inv_freq, fx.Node)
    half, width = int(inv_freq.meta["val"].shape[0]), int(source.meta["val"].shape[2])
    fits = width % 8 == 0 and half % 8 == 0 and half <= width // 2
    stored = positions.op == "placeholder" and inv_freq.op == "get_attr"
    small = 2 * 4 * half * spec.max_context <= _MOST_TABLE_BYTES
    if tail or style not in ("half", "interleaved") or not (fits and stored and small):
        return None
    return Rotary(source, before, inv_freq, float(scale), str(style))  # pyright: ignore[reportArgumentType]


def packed_source(q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node | None:
    """The value `[T, (heads + 2 * groups) * D]` that `q`, `k` and `v` (`[T, heads or groups, D]`) are
    consecutive columns of, in this order and with nothing beside them; None where there is none."""
    at, source = 0, None
    for node in (q, k, v):
        part = _slice_under(node)
        if part is None or (source is not None and part.args[0] is not source):
            return None
        source, _, start, stop = part.args[:4]
        if start != at or not isinstance(stop, int):
            return None
        assert isinstance(source, fx.Node)
        at = min(stop, int(source.meta["val"].shape[1]))
    assert isinstance(source, fx.Node)
    return source if at == int(source.meta["val"].shape[1]) else None


def _slice_under(node: fx.Node) -> fx.Node | None:
    """The columns of a matrix that `node` is a view of."""
    if not _is(node, *_VIEWS):
        return None
    part: Any = node.args[0]
    is_columns = _is(part, "aten.slice.Tensor") and len(part.args) == 4 and part.args[1] in (1, -1)
    return part if is_columns and len(part.args[0].meta["val"].shape) == 2 else None


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and str(node.target) in names
