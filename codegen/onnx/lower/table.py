"""All lowerings by operator: the overload's full name, or the name for all overloads."""

from __future__ import annotations

from ..emitter import Lowering
from . import attention, elementwise, experts, index, norms, products, reduce, rope, views

_MODULES = (views, elementwise, reduce, index, products, norms, rope, attention, experts)


def lowerings() -> dict[str, Lowering]:
    """Every operator that has an ONNX form."""
    return {name: lowering for module in _MODULES for name, lowering in module.LOWERINGS.items()}
