"""The layout of the paged KV cache, as data. Page arithmetic only; who owns a page is the runtime's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import InternalError

Kind = Literal["full", "window", "chunk"]
CODED_DTYPES = ("int8", "float8_e4m3fn")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers whose K and V share one block table.

    All layers of a group have the same shape and visibility. `layers` own storage; `shared` maps a
    layer without storage to the owner it reads. `window` is in tokens for kinds `window` and
    `chunk`, 0 for `full`. `scales` says whether a float32 scale per token and head is stored
    beside quantised values. InternalError for another kind, or a window that does not fit it.
    """

    layers: tuple[int, ...]
    kind: Kind = "full"
    window: int = 0
    num_kv_heads: int
    k_dim: int
    v_dim: int
    v_source: Literal["own", "k_prefix"] = "own"
    dtype: str
    scales: bool = False
    page_tokens: int
    shared: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise _unusable(f"The kind {self.kind!r} is none of {', '.join(get_args(Kind))}.")
        if (self.window > 0) != (self.kind != "full"):
            raise _unusable(f"A window of {self.window} tokens does not go with kind {self.kind!r}.")

    @property
    def is_coded(self) -> bool:
        """Whether the dtype holds codes, which mean nothing without scales."""
        return self.dtype in CODED_DTYPES

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token over all layers of the group."""
        width = self.k_dim + (self.v_dim if self.v_source == "own" else 0)
        values = width * _DTYPE_BYTES[self.dtype]
        scales = (2 if self.v_source == "own" else 1) * 4 if self.scales else 0
        return len(self.layers) * self.num_kv_heads * (values + scales)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the group."""
        return self.bytes_per_token * self.page_tokens

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one sequence, none of them freed."""
        return -(-num_tokens // self.page_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """All cache groups of a model. A sequence has one block table per group."""

    groups: tuple[CacheGroup, ...]

    def owner_of(self, layer: int) -> tuple[int, int]:
        """(group index, layer that owns the storage) for attention layer `layer`."""
        for index, group in enumerate(self.groups):
            if layer in group.layers:
                return index, layer
            for reader, owner in group.shared:
                if reader == layer:
                    return index, owner
        raise KeyError(layer)

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of one token over the whole model."""
        return sum(group.bytes_per_token for group in self.groups)


def _unusable(why: str) -> InternalError:
    return InternalError(
        "spec.cache_group",
        "A cache group says something that no kernel or page table could follow.",
        why,
        "Report this with the model, or the manifest, that led to it.",
    )
