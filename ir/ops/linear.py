"""Matrix products and table look-ups, plain and over quantised weights.

Products are computed in tiles of `ROW_TILE` rows, the last one padded with zeros: a library matmul
may change its reduction with the number of rows, and a row's bits must not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...spec.quant import parse_scheme
from ..quantized import dequantize_rows, take_rows
from ..rounded import rounded_input
from .registration import operator

ROW_TILE = 32


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x[..., K] @ weight[N, K].T` in fixed padded row tiles; gives `[..., N]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty((rows.shape[0], weight.shape[0]))
    for start in range(0, rows.shape[0], ROW_TILE):
        tile = rows[start : start + ROW_TILE]
        missing = ROW_TILE - tile.shape[0]
        padded = F.pad(tile, (0, 0, 0, missing)) if missing else tile
        out[start : start + ROW_TILE] = F.linear(padded, weight)[: tile.shape[0]]
    return out.reshape(*x.shape[:-1], weight.shape[0])


@operator("llmc::linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x[..., K] @ weight[N, K].T + bias[N]`, in x's dtype."""
    out = tiled_linear(x, weight)
    return out if bias is None else out + bias


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("llmc::quantized_linear")
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    activation: str = "",
    activation_scale: Tensor | None = None,
) -> Tensor:
    """`linear` with the weight given as codes of `scheme` (see `ir.quantized` for their packing).

    K is `x.shape[-1]`, and codes beyond it are padding. Without `activation` the weight is dequantised to
    x's dtype before the product. With one (`spec.quant.ActivationScheme`), x is rounded to its codes, by row
    and group, and the product is computed in float32 and rounded to x's dtype once; `activation_scale`, one
    float32, is the stored scale of a static scheme.
    """
    rows = rounded_input(x, activation, activation_scale)
    weight = dequantize_rows(codes, scales, zeros, parse_scheme(scheme), x.shape[-1], rows.dtype)
    out = tiled_linear(rows, weight)
    return (out if bias is None else out + bias).to(x.dtype)


@quantized_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    activation: str = "",
    activation_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@operator("llmc::embedding")
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight[V, D]` at `ids[...]`; gives `[..., D]`."""
    return F.embedding(ids, weight)


@embedding.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@operator("llmc::quantized_embedding")
def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: str, width: int, dtype: str
) -> Tensor:
    """Rows of a table `[V, width]` stored as codes of `scheme`, dequantised to `dtype`."""
    rows = take_rows(codes, scales, zeros, parse_scheme(scheme), ids.reshape(-1), width)
    return rows.to(getattr(torch, dtype)).reshape(*ids.shape, width)


@quantized_embedding.register_fake
def _(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: str, width: int, dtype: str
) -> Tensor:
    return scales.new_empty((*ids.shape, width), dtype=getattr(torch, dtype))


@operator("llmc::gather_rows")
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `rows[L]` of `x[T, ...]`; gives `[L, ...]`."""
    return x.index_select(0, rows)


@gather_rows.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty((rows.shape[0], *x.shape[1:]))
