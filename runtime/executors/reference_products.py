"""Matrix products of the reference executor: how many threads each gets, and which dequantised weights are
kept. Neither changes a bit of any result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.quantized import dequantize_rows
from ...ir.rounded import rounded_input
from ...spec.quant import parse_scheme

# Below this many weights a product is done before other threads have woken up.
_THREADED_SIZE = 2**20


class Products:
    """`llmc.linear` and `llmc.quantized_linear` with the values of their reference implementations.

    Products use `num_threads` threads where that pays; everything else runs on one, so the caller must
    have set one. Quantised matrices are dequantised once and kept while `dense_bytes` last.
    """

    def __init__(self, num_threads: int, dense_bytes: int) -> None:
        self._num_threads = num_threads
        self._dense_bytes = dense_bytes
        self._dense: dict[tuple[int, torch.dtype], Tensor] = {}
        self.used_bytes = 0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`: the shape of each product is fixed, so no row depends on where a thread's
        part ends."""
        return self._threaded(weight.numel(), torch.ops.llmc.linear.default, x, weight, bias)

    def quantized_linear(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        activation: str = "",
        activation_scale: Tensor | None = None,
    ) -> Tensor:
        """`linear` with the weight of `scheme`, from memory where it was kept."""
        rows = rounded_input(x, activation, activation_scale)
        weight = self._kept(codes, scales, zeros, scheme, x.shape[-1], rows.dtype)
        if weight is None:
            weight = self._dequantized(codes, scales, zeros, scheme, x.shape[-1], rows.dtype)
        return self.linear(rows, weight, bias).to(x.dtype)

    def quantized_moe(
        self,
        x: Tensor,
        expert_ids: Tensor,
        expert_weights: Tensor,
        gate_up_codes: Tensor,
        gate_up_scales: Tensor,
        gate_up_zeros: Tensor | None,
        down_codes: Tensor,
        down_scales: Tensor,
        down_zeros: Tensor | None,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        interleaved: bool,
        alpha: float,
        limit: float,
        gate_up_scheme: str,
        down_scheme: str,
        activation_scheme: str = "",
    ) -> Tensor:
        """`llmc.moe` over experts from memory, or `llmc.quantized_moe`, which dequantises those it needs."""
        inner = gate_up_codes.shape[1] // (1 if activation.startswith("plain:") else 2)
        gate_up_parts = (gate_up_codes, gate_up_scales, gate_up_zeros)
        down_parts = (down_codes, down_scales, down_zeros)
        gate_up = down = None
        if not activation_scheme:  # the operator without codes rounds no activations
            gate_up = self._kept(*gate_up_parts, gate_up_scheme, x.shape[-1], x.dtype)
            down = self._kept(*down_parts, down_scheme, inner, x.dtype)
        routed, biases = (x, expert_ids, expert_weights), (gate_up_bias, down_bias)
        settings = (activation, interleaved, alpha, limit)
        if gate_up is None or down is None:
            schemes = (gate_up_scheme, down_scheme, activation_scheme)
            operator = torch.ops.llmc.quantized_moe.default
            return operator(*routed, *gate_up_parts, *down_parts, *biases, *settings, *schemes)
        return torch.ops.llmc.moe.default(*routed, gate_up, down, *biases, *settings)

    def substitute(self, graph: fx.Graph) -> fx.Graph:
        """A copy of `graph` that calls these products."""
        ours: dict[Any, Callable[..., Tensor]] = {
            torch.ops.llmc.linear.default: self.linear,
            torch.ops.llmc.quantized_linear.default: self.quantized_linear,
            torch.ops.llmc.quantized_moe.default: self.quantized_moe,
        }
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        for node in copy.nodes:
            if node.op == "call_function":
                node.target = ours.get(node.target, node.target)
        return copy

    def _kept(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: str,
        width: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The dequantised `[..., width]` of `codes`, now kept; None when the budget does not allow it."""
        key = (codes.data_ptr(), dtype)
        if key in self._dense:
            return self._dense[key]
        size_bytes = codes.shape[:-1].numel() * width * dtype.itemsize
        if self.used_bytes + size_bytes > self._dense_bytes:
            return None
        weight = self._dequantized(codes, scales, zeros, scheme, width, dtype)
        self._dense[key] = weight
        self.used_bytes += size_bytes
        return weight

    def _dequantized(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: str,
        width: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The dequantised `[..., width]` of `codes`."""
        parsed = parse_scheme(scheme)
        if codes.dim() > 2 and parsed.block_rows:  # blocks of rows end with each expert
            none = [None] * codes.shape[0]
            experts = zip(codes, scales, none if zeros is None else zeros, strict=True)
            return torch.stack([self._dequantized(*expert, scheme, width, dtype) for expert in experts])
        rows = [None if part is None else part.flatten(0, -2) for part in (codes, scales, zeros)]
        flat = self._threaded(codes.numel(), dequantize_rows, *rows, parsed, width, dtype)
        return flat.reshape(*codes.shape[:-1], width)

    def _threaded(self, size: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self._num_threads == 1 or size < _THREADED_SIZE:
            return function(*args)
        torch.set_num_threads(self._num_threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(1)
