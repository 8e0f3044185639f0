"""How large the values of some nodes get, by channel, over calibration tokens, and some of these values.
Knows no method."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...ir.interpret import interpret
from ...ir.program import Program
from ..calibration import Calibration

# Largest magnitudes settle after a few thousand tokens.
MOST_TOKENS = 8192
_BATCH_TOKENS = 2048
# Rows that are kept of each value, spread over the first batch.
_KEPT_ROWS = 64


class Seen(NamedTuple):
    """Of one value: the largest magnitude of each channel `[K]` and some rows `[T, K]`, in float32."""

    top: Tensor
    rows: Tensor


def channel_ranges(
    program: Program, nodes: Collection[fx.Node], calibration: Calibration
) -> dict[fx.Node, Tensor]:
    """The largest magnitude of each channel (last dimension) of each of `nodes`, in float32, over at most
    `MOST_TOKENS` tokens. The program must not be paged."""
    return {node: seen.top for node, seen in observe_values(program, nodes, calibration).items()}


def observe_values(
    program: Program, nodes: Collection[fx.Node], calibration: Calibration
) -> dict[fx.Node, Seen]:
    """As `channel_ranges`, with some rows of each value."""
    wanted, found = set(nodes), dict[fx.Node, Seen]()

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted and len(value):
            rows = value.flatten(0, -2)
            top = rows.float().abs().amax(0)
            if node in found:
                found[node] = Seen(torch.maximum(found[node].top, top), found[node].rows)
            else:
                step = max(1, len(rows) // _KEPT_ROWS)
                found[node] = Seen(top, rows[::step][:_KEPT_ROWS].float().clone())

    batches = _batches(calibration)
    for index, batch in enumerate(batches):
        calibration.watch(index, len(batches), "largest magnitudes")
        interpret(program.graph, _inputs(batch), program.weights.evaluate, observe)
    return found


def _batches(calibration: Calibration) -> list[list[tuple[int, ...]]]:
    batches: list[list[tuple[int, ...]]] = []
    total, filled = 0, _BATCH_TOKENS
    for sequence in calibration.sequences:
        if total and total + len(sequence) > MOST_TOKENS:
            break
        if filled >= _BATCH_TOKENS:
            batches.append([])
            filled = 0
        batches[-1].append(sequence)
        filled += len(sequence)
        total += len(sequence)
    return batches


def _inputs(sequences: list[tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([token for sequence in sequences for token in sequence]),
        "positions": torch.cat([torch.arange(len(sequence)) for sequence in sequences]),
        "out_rows": torch.tensor([sum(map(len, sequences)) - 1]),
    }
