"""Weights as an ONNX graph reads them: where their bytes lie, and the nodes that make floats of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from ...ir.weights import WeightStore
from ...spec.errors import InternalError
from .graph import FLOAT, INT64, OnnxGraph, StoredTensor

ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The written weights of a model: shapes and dtypes of `store`, places by name."""

    store: WeightStore
    places: Mapping[str, StoredTensor]

    def place(self, name: str) -> StoredTensor:
        """Where `name` lies. Raises InternalError when it was not written."""
        if name not in self.places:
            raise InternalError(
                "onnx.unwritten_weight",
                f"The weight {name!r} was not written.",
                "The graph reads it and the list of weights to write did not have it.",
                "Report this with the command that led to it.",
            )
        return self.places[name]

    def raw(
        self,
        graph: OnnxGraph,
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: tuple[int, ...] | None = None,
        rows: range | None = None,
    ) -> ir.Value:
        """The stored bytes of `name`, or of its rows `rows`, as another dtype or shape of as many bytes where
        given."""
        expr = self.store[name]
        known, place = ONNX_DTYPES[expr.dtype], self.place(name)
        stored = tuple(expr.shape)
        if rows is not None:
            place = place.rows(rows, stored[0])
            name, stored = f"{name}[{rows.start}:{rows.stop}]", (len(rows), *stored[1:])
        dims = stored if shape is None else shape
        as_is = (dtype or known) == known and dims == stored
        alias = name if as_is else f"{name}:{(dtype or known).name.lower()}{'x'.join(map(str, dims))}"
        return graph.weight(alias, dtype or known, dims, place)

    def plain(self, graph: OnnxGraph, name: str, rows: range | None = None) -> ir.Value:
        """`name`, or some of its rows, as float32, int64 or bool: narrower floats are widened by a node that
        loading folds."""
        dtype = self.store[name].dtype
        raw = self.raw(graph, name, rows=rows)
        if dtype in (torch.float32, torch.int64, torch.bool):
            return raw
        return graph.cached_cast(raw, FLOAT if dtype.is_floating_point else INT64)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`."""
        return tuple(self.store[name].shape)

    def dtype(self, name: str) -> Any:
        """The dtype of `name`."""
        return self.store[name].dtype
