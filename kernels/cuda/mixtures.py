"""Mixtures of experts by launches: pairs into tiles, two products over the experts' own weights, the sum of a
token's choices. Nothing is read back: a recorded step routes by what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...spec.errors import TargetError
from ...spec.quant import parse_scheme
from .launch import blocks, launch_of, power_of_two
from .products import CudaProducts, Routing, Tile, expect_scheme, group_of, int32_of

_PAIRS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class CudaMixtures(CudaProducts):
    """Mixtures named and called like those of `ir.ops`."""

    def moe(
        self,
        x: Any,
        expert_ids: Any,
        expert_weights: Any,
        gate_up: Any,
        down: Any,
        gate_up_bias: Any,
        down_bias: Any,
        activation: str,
        interleaved: bool,
        alpha: float,
        limit: float,
    ) -> Any:
        """`llmc.moe`."""
        rows = self._rows(x)
        routing, tile_rows = self._route(expert_ids, gate_up.shape[0])
        hidden = self._hidden(rows, expert_ids, gate_up.shape[1])
        self._dense(rows, gate_up, gate_up_bias, hidden, _tile(routing, gate_up.shape[1], tile_rows), routing)
        active = self._activated(hidden, down.shape[-1], activation, interleaved, alpha, limit)
        results = self._hidden(rows, expert_ids, down.shape[1])
        own = Routing(routing.experts, routing.pairs, 1)
        self._dense(active, down, down_bias, results, _tile(own, down.shape[1], tile_rows), own)
        return self._combined(results, expert_weights, x)

    def quantized_moe(
        self,
        x: Any,
        expert_ids: Any,
        expert_weights: Any,
        gate_up_codes: Any,
        gate_up_scales: Any,
        gate_up_zeros: Any,
        down_codes: Any,
        down_scales: Any,
        down_zeros: Any,
        gate_up_bias: Any,
        down_bias: Any,
        activation: str,
        interleaved: bool,
        alpha: float,
        limit: float,
        gate_up_scheme: str,
        down_scheme: str,
        activation_scheme: str = "",
    ) -> Any:
        """`llmc.quantized_moe`, codes of fewer than 8 bits in words `[E * N, W]`. Raises TargetError for
        a scheme without a kernel."""
        if activation_scheme:
            raise TargetError(
                "cuda.scheme",
                "Experts with rounded activations have no kernel on this target.",
                f"Theirs are rounded as {activation_scheme!r}, and kernels take them in the compute dtype.",
                "Leave the experts out of round_inputs, or compile with --target reference.",
            )
        rows = self._rows(x)
        experts, columns = gate_up_scales.shape[:2]
        width = columns if activation.startswith("plain:") else columns // 2
        for scheme, inner in ((gate_up_scheme, x.shape[-1]), (down_scheme, width)):
            expect_scheme(scheme, group_of(parse_scheme(scheme), inner), "")
        routing, tile_rows = self._route(expert_ids, experts)
        hidden = self._hidden(rows, expert_ids, columns)
        weight = (gate_up_codes, gate_up_scales, gate_up_zeros)
        tile = _tile(routing, columns, tile_rows)
        self._coded(rows, weight, gate_up_bias, hidden, gate_up_scheme, tile, routing)
        active = self._activated(hidden, width, activation, interleaved, alpha, limit)
        results = self._hidden(rows, expert_ids, down_scales.shape[1])
        own = Routing(routing.experts, routing.pairs, 1)
        tile = _tile(own, down_scales.shape[1], tile_rows)
        self._coded(active, (down_codes, down_scales, down_zeros), down_bias, results, down_scheme, tile, own)
        return self._combined(results, expert_weights, x)

    def _route(self, ids: Any, experts: int) -> tuple[Routing, int]:
        """Tiles of pairs, as many as there may be, and the rows of each."""
        tokens, choices = ids.shape
        pairs = tokens * choices
        tile_rows = _tile_rows(tokens, experts)
        tiles = min(pairs, experts + pairs // tile_rows)
        flat = ids if ids.is_contiguous() else self._copied(ids)
        counts = self.empty(ids, (experts,), int32_of(ids))
        owners = self.empty(ids, (tiles,), int32_of(ids))
        placed = self.empty(ids, (tiles * tile_rows,), int32_of(ids))
        values = {"ids_ptr": flat, "counts_ptr": counts, "pairs": pairs}
        block = {"BLOCK": _PAIRS_AT_ONCE}
        self.launch(launch_of("experts.count_pairs", (experts,), values, block))
        values = {"ids_ptr": flat, "counts_ptr": counts, "experts_ptr": owners, "placed_ptr": placed}
        values |= {"pairs": pairs, "tiles": tiles}
        shape = {"EXPERTS": experts, "EXPERT_BLOCK": power_of_two(experts), "TILE": tile_rows}
        self.launch(launch_of("experts.place_pairs", (experts,), values, shape | block))
        return Routing(owners, placed, choices), tile_rows

    def _hidden(self, rows: Any, ids: Any, width: int) -> Any:
        return self.empty(rows, (ids.shape[0] * ids.shape[1], width), None)

    def _activated(
        self, hidden: Any, width: int, activation: str, interleaved: bool, alpha: float, limit: float
    ) -> Any:
        out = self.empty(hidden, (hidden.shape[0], width), None)
        block = min(1024, power_of_two(width))
        values = {"hidden_ptr": hidden, "out_ptr": out, "alpha": float(alpha), "limit": float(limit)}
        shape = {"WIDTH": width, "COLUMNS": hidden.shape[1] // width, "INTERLEAVED": interleaved}
        shape |= {"ACTIVATION": activation.removeprefix("plain:"), "BLOCK": block}
        grid = (hidden.shape[0], blocks(width, block))
        self.launch(launch_of("experts.expert_activation", grid, values, shape))
        return out

    def _combined(self, results: Any, weights: Any, x: Any) -> Any:
        out = self.empty(x, x.shape, None)
        width = x.shape[-1]
        block = min(1024, power_of_two(width))
        dense = weights if weights.is_contiguous() else self._copied(weights)
        values = {"results_ptr": results, "weights_ptr": dense, "out_ptr": out}
        shape = {"WIDTH": width, "CHOICES": weights.shape[1], "BLOCK": block}
        grid = (weights.shape[0], blocks(width, block))
        self.launch(launch_of("experts.combine", grid, values, shape))
        return out


def _tile_rows(tokens: int, experts: int) -> int:
    """Few tokens leave few to each expert; of many, many."""
    if tokens <= 64:
        return 16
    return 32 if experts >= 32 else 64


def _tile(routing: Routing, n: int, rows: int) -> Tile:
    tiles = routing.experts.shape[0]
    return Tile((blocks(n, 64), tiles, 1), {"BM": rows, "BN": 64}, 4, 4 if rows < 64 else 3)
