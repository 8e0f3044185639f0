"""The operators a Program may contain: all of `llmc::`, and a listed set of ATen."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload

from ..spec.errors import ArtifactError
from . import ops as _registered  # noqa: F401 # pyright: ignore[reportUnusedImport] - registers them

# Overload packets of ATen that generic regions may keep after decomposition. None of them mutates.
ATEN_NAMES = frozenset(
    """
    _softmax _to_copy abs add addcmul addmm alias amax amin any arange argmax argsort baddbmm bincount
    bitwise_and bitwise_not bitwise_or bmm cat ceil chunk clamp clamp_max clamp_min clone complex
    constant_pad_nd contiguous copy cos cumsum detach div elu embedding empty eq erf erfc erfinv exp
    expand expm1 flatten flip floor floor_divide full full_like gather ge gelu glu group_norm gt hardtanh
    hypot imag index index_add index_put index_select isinf isnan layer_norm le leaky_relu
    lift_fresh_copy linear log log1p logical_and logical_not logical_or logsumexp lt masked_fill matmul
    max maximum mean min minimum mish mm movedim mul narrow native_layer_norm ne neg new_ones new_zeros
    one_hot ones ones_like permute polar pow real reciprocal relu remainder repeat repeat_interleave
    reshape rms_norm roll round rsqrt rsub scalar_tensor scatter scatter_add select select_scatter
    sigmoid sign silu sin slice slice_scatter softmax softplus sort split split_with_sizes sqrt square
    squeeze stack std sub sum sym_numel sym_size tanh tile to topk transpose tril triu type_as unbind
    unflatten unsqueeze var view view_as_complex view_as_real view_copy where zeros zeros_like
    """.split()  # noqa: SIM905
)

_PYTHON = {
    "operator.getitem": operator.getitem,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.mod": operator.mod,
}


def operator_name(target: Any) -> str:
    """The stable name of a call target, such as `llmc.rope.default`. Raises ValueError for a foreign one."""
    if not is_listed(target):
        raise ValueError(f"{target} is not in the vocabulary of programs")
    if isinstance(target, OpOverload):
        return str(target)
    return next(name for name, function in _PYTHON.items() if function is target)


def is_listed(target: Any) -> bool:
    """Whether a program may call `target`."""
    if isinstance(target, OpOverload):
        namespace, name = target.name().split(".")[0].split("::")
        return namespace == "llmc" or (namespace == "aten" and name in ATEN_NAMES)
    return any(target is function for function in _PYTHON.values())


def operator_named(name: str) -> Any:
    """Inverse of `operator_name`. Raises ArtifactError for a name outside the vocabulary."""
    if name in _PYTHON:
        return _PYTHON[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in ("llmc", "aten"):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        if overload is not None and is_listed(overload):
            return overload
    raise ArtifactError(
        "artifact.operator",
        f"The stored program uses operator {name!r}.",
        "This version of llmc has no such operator.",
        "Load the artifact with the version that wrote it, or compile the model again.",
    )
