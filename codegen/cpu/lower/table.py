"""Which lowering an operator has: by its overload where that matters, else by its name."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

from ....ir.vocabulary import operator_name
from ..emitter import Lowering
from . import attention, canonical, elementwise, index, moe, reduce, views

LOWERINGS: dict[str, Lowering] = {
    **views.LOWERINGS,
    **elementwise.LOWERINGS,
    **reduce.LOWERINGS,
    **index.LOWERINGS,
    **canonical.LOWERINGS,
    **attention.LOWERINGS,
    **moe.LOWERINGS,
}


def lowering_of(target: Any) -> Lowering | None:
    """The lowering of a call target, or None when this target has none."""
    name = operator_name(target)
    if isinstance(target, OpOverload) and name not in LOWERINGS:
        name = ".".join(name.split(".")[:2])
    return LOWERINGS.get(name)
