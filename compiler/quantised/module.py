"""One quantised linear of a checkpoint: its tensors by short name, and what all formats check alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.coded import Dequantized
from ...ir.weights import Cast, Constant, Expr, Permute, Reader, Source
from ...spec.errors import ModelError
from ...spec.quant import QuantScheme
from ..shards import StoredTensor


class Scales(NamedTuple):
    """Scales in a dtype that holds them exactly, and its name."""

    expr: Expr
    dtype: str


@dataclass(slots=True)
class Shared:
    """Small tensors that modules have in common, so that equal ones are one: column orders, static scales."""

    reader: Reader = field(default_factory=Reader)
    known: dict[bytes, Constant] = field(default_factory=dict[bytes, Constant])

    def constant(self, tensor: Tensor) -> Constant:
        """The one constant of these values."""
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        key = f"{tensor.dtype}{list(tensor.shape)}".encode() + flat.numpy().tobytes()
        return self.known.setdefault(key, Constant(tensor.contiguous()))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedModule:
    """`name` without a trailing dot, and its tensors by what follows the dot."""

    name: str
    tensors: Mapping[str, StoredTensor]
    shared: Shared

    def source(self, part: str, *shapes: tuple[int, ...]) -> Source:
        """The tensor `part`. Raises ModelError where it is missing, or has none of `shapes` (if given)."""
        if part not in self.tensors:
            raise ModelError(
                "model.code_parts",
                f"The quantised weight {self.name!r} has no tensor {part!r}.",
                f"The checkpoint stores {', '.join(sorted(self.tensors))} for it.",
                "Restore the checkpoint from where it came from.",
            )
        stored = self.tensors[part]
        if shapes and stored.shape not in shapes:
            raise ModelError(
                "model.code_shape",
                f"Tensor '{self.name}.{part}' has shape {list(stored.shape)}.",
                f"With its siblings and the quantisation config it should be {list(shapes[0])}.",
                "Check that weights and quantization_config belong together.",
            )
        return Source(str(stored.path), stored.key, stored.shape, stored.dtype)

    def value(self, part: str) -> Tensor:
        """The values of a small tensor."""
        return self.source(part).evaluate(self.shared.reader)

    def integer_scales(self, expr: Expr) -> Scales:
        """`expr` as float16 where that is exact, which needs a look at bfloat16 and float32 values."""
        if expr.dtype == torch.float16:
            return Scales(expr, "float16")
        values = expr.evaluate(self.shared.reader)
        if torch.equal(values.to(torch.float16).to(values.dtype), values):
            return Scales(Cast(expr, torch.float16), "float16")
        return Scales(expr if expr.dtype == torch.float32 else Cast(expr, torch.float32), "float32")

    def refuse(self, what: str, why: str) -> ModelError:
        """An error about how this weight is quantised."""
        return unsupported(f"The weight {self.name!r} is quantised {what}.", why)

    def group_size(self, in_features: int, groups: int, declared: int) -> int:
        """Columns that share a scale, 0 for all: as declared (-1 for all), checked against what is stored."""
        size = in_features if declared in (-1, 0) else declared
        if -(-in_features // size) != groups:
            raise ModelError(
                "model.code_shape",
                f"The quantised weight {self.name!r} has {groups} scales a row.",
                f"Groups of {declared} make {-(-in_features // size)} of its {in_features} inputs.",
                "Check that weights and quantization_config belong together.",
            )
        return 0 if size >= in_features else size


def dequantized(
    codes: Expr, scales: Scales, zeros: Expr | None, scheme: QuantScheme, width: int
) -> Dequantized:
    """The weight as values in float32."""
    assert scheme.scale_dtype == scales.dtype
    return Dequantized(codes, scales.expr, zeros, scheme, width, torch.float32)


def transposed(of: Expr) -> Expr:
    """Rows as columns."""
    return Permute(of, (1, 0))


def unsupported(what: str, why: str) -> ModelError:
    """A quantised checkpoint that cannot be read, and what to do instead."""
    return ModelError(
        "model.quantised_form", what, why, "Use the unquantised model, and quantise it with --quant."
    )
