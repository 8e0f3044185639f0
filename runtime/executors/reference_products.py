"""Matrix products of the reference executor: how many threads each gets, and which dequantised weights are
kept. Neither changes a bit of any result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.quantized import dequantize_rows
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
        self, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, scheme: str
    ) -> Tensor:
        """`linear` with the weight of `scheme`, from memory where it was kept."""
        key = (codes.data_ptr(), x.dtype)
        weight = self._dense.get(key)
        if weight is None:
            weight = self._threaded(codes.numel(), _dequantize, x, codes, scales, zeros, scheme)
            if self.used_bytes + weight.nbytes <= self._dense_bytes:
                self._dense[key] = weight
                self.used_bytes += weight.nbytes
        return self.linear(x, weight, bias)

    def substitute(self, graph: fx.Graph) -> fx.Graph:
        """A copy of `graph` that calls these products."""
        ours: dict[Any, Callable[..., Tensor]] = {
            torch.ops.llmc.linear.default: self.linear,
            torch.ops.llmc.quantized_linear.default: self.quantized_linear,
        }
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        for node in copy.nodes:
            if node.op == "call_function":
                node.target = ours.get(node.target, node.target)
        return copy

    def _threaded(self, size: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self._num_threads == 1 or size < _THREADED_SIZE:
            return function(*args)
        torch.set_num_threads(self._num_threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(1)


def _dequantize(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: str) -> Tensor:
    return dequantize_rows(codes, scales, zeros, parse_scheme(scheme), x.shape[-1], x.dtype)
