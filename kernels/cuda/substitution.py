"""A graph whose llmc operators are launched: every other operator stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .fusing import fuse_products, fuse_rotations
from .operators import CudaOperators

_NAMES = (
    "embedding",
    "gather_rows",
    "rms_norm",
    "layer_norm",
    "add_rms_norm",
    "add_layer_norm",
    "gated_activation",
    "gated_activation_packed",
    "rope",
    "kv_write",
    "moe",
    "quantized_moe",
    "rope_kv_write",
    "paged_attention",
)


def substitute(
    graph: fx.Graph, operators: CudaOperators, multiply: Callable[..., Any] | None = None
) -> fx.Graph:
    """A copy of `graph` that calls `operators` for those they have, products and rotations with what is
    around them: `multiply` stands in for their `product`.

    Others, ATen's among them, keep their target: torch runs them, on the device of their inputs.
    """

    def quantized_embedding(
        ids: Any, codes: Any, scales: Any, zeros: Any, scheme: str, width: int, dtype: str
    ) -> Any:
        element = getattr(torch, dtype)
        return operators.quantized_embedding(ids, codes, scales, zeros, scheme, width, element)

    ours: dict[Any, Callable[..., Any]] = {
        getattr(torch.ops.llmc, name).default: getattr(operators, name) for name in _NAMES
    }
    ours[torch.ops.llmc.quantized_embedding.default] = quantized_embedding
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    fuse_products(copy, multiply or operators.product)
    fuse_rotations(copy, operators.normed_rope_kv_write)
    for node in copy.nodes:
        if node.op == "call_function":
            node.target = ours.get(node.target, node.target)
    return copy
