"""The mask function of a trace: what a mask means, in place of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...spec.errors import ModelError
from . import adapter


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A causal mask, with a sliding window or chunk of that many tokens (0: none).

    It travels through a transformers model in place of the mask tensor.
    """

    window: int = 0
    chunk: int = 0


def mask_spec(*, mask_function: Callable[..., Any], attention_mask: Any = None, **_: Any) -> MaskSpec:
    """The mask function that is registered: reads `mask_function` instead of evaluating it.

    Raises ModelError for a part that is not known. Restricting to packed sequences is `llmc.attention`'s
    own business and is passed over.
    """
    if attention_mask is not None:
        raise _error("a padding mask")
    sizes = {"window": 0, "chunk": 0}
    causal = False
    for kind, size in _parts(mask_function):
        causal |= kind == "causal"
        if kind in sizes:
            sizes[kind] = size
    if not causal:
        raise _error("a mask that is not causal")
    return MaskSpec(**sizes)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, int]]:
    """(kind, size) of every elementary mask that `function` combines."""
    name = getattr(function, "__qualname__", repr(function))
    kind = adapter.MASK_PARTS.get(name)
    if kind is None:
        raise _error(f"the mask function {name}")
    cells = _closure(function)
    if kind in adapter.MASK_SIZES:
        yield kind, int(cells[adapter.MASK_SIZES[kind]])
    elif kind in ("all", "remapped"):
        for value in cells.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if callable(part):
                    yield from _parts(part)
    else:
        yield kind, 0


def _closure(function: Any) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _error(what: str) -> ModelError:
    return ModelError(
        "model.attention_mask",
        f"The model builds {what}.",
        "llmc knows causal masks with a sliding window or chunks; any other would be lost.",
        "Choose a model family that `llmc models` lists as supported.",
    )
