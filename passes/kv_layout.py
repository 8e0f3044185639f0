"""Decide how K and V are cached: groups of layers, page size, dtype.

    layers 0 2 full, 1 3 window 512      →    group 0: layers 0 2, full      block_table_0
                                              group 1: layers 1 3, window    block_table_1

Layers of one shape and one visibility share a block table, so that a group frees its pages alone. The graph
stays as it is; `program.cache` is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from ..ir.program import Program
from ..spec.cache import CODED_DTYPES, CacheGroup, CacheLayout
from ..spec.errors import InternalError
from ..spec.history import Decision
from ..spec.model import AttentionSpec, ModelSpec
from .base import (
    CANONICAL,
    KV_LAYOUT,
    Contract,
    Exact,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
    option,
)

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Plan the paged KV cache."""

    name: ClassVar[str] = "kv_layout"
    stage: ClassVar[Stage] = Stage.layout
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({KV_LAYOUT})
    contract: ClassVar[Contract] = Exact()

    dtype: str = option(
        "auto",
        "Dtype of cached values; auto is the compute dtype. int8 and fp8 (e4m3) keep a scale for each token "
        "and head, computed as it is written.",
        choices=DTYPES,
        search=("auto", "int8"),
    )
    page_tokens: int = option(0, "Tokens of one page; 0 is the target's default.", low=0, high=4096)
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per attention layer; a decision per group."""
        spec = program.spec
        auto = context.target.cache_dtype or spec.compute_dtype
        dtype = {"auto": auto, "fp8": "float8_e4m3fn"}.get(self.dtype, self.dtype)
        layout = plan_cache(spec, dtype, self.page_tokens or context.target.page_tokens)
        decisions = tuple(_describe(index, group) for index, group in enumerate(layout.groups))
        report = PassReport(matches=len(spec.attention), decisions=decisions)
        return PassResult(program=program.replace(cache=layout), report=report)


class _GroupKey(NamedTuple):
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int
    chunk: int

    @property
    def kind(self) -> Literal["full", "window", "chunk"]:
        """What pages are freed by; where both limit what is seen, either is right."""
        if self.window:
            return "window"
        return "chunk" if self.chunk else "full"


def plan_cache(spec: ModelSpec, dtype: str, page_tokens: int) -> CacheLayout:
    """The layout for `spec`: groups in order of their first layer, readers of shared layers listed.

    Raises InternalError when a layer reads the cache of one that owns none.
    """
    layers = {layer.layer: layer for layer in spec.attention}
    owners: dict[_GroupKey, list[int]] = {}
    for layer in spec.attention:
        if layer.kv_source == layer.layer:
            owners.setdefault(_key(layer), []).append(layer.layer)
    shared = {reader.layer: _owner(reader, layers) for reader in spec.attention if _is_reader(reader)}
    groups = tuple(
        CacheGroup(
            layers=tuple(owned),
            kind=key.kind,
            window=key.window or key.chunk,
            num_kv_heads=key.num_kv_heads,
            k_dim=key.k_dim,
            v_dim=key.v_dim,
            dtype=dtype,
            scales=dtype in CODED_DTYPES,
            page_tokens=page_tokens,
            shared=tuple((reader, owner) for reader, owner in shared.items() if owner in owned),
        )
        for key, owned in owners.items()
    )
    return CacheLayout(groups=_widened(groups, layers.values()))


def _is_reader(layer: AttentionSpec) -> bool:
    return layer.kv_source != layer.layer


def _key(layer: AttentionSpec) -> _GroupKey:
    return _GroupKey(layer.num_kv_heads, layer.qk_dim, layer.v_dim, layer.window, layer.chunk)


def _owner(reader: AttentionSpec, layers: dict[int, AttentionSpec]) -> int:
    owner = layers.get(reader.kv_source)
    if owner is None or _is_reader(owner):
        raise InternalError(
            "passes.kv_source",
            f"Attention layer {reader.layer} reads the cache of layer {reader.kv_source}.",
            "That layer writes no cache of its own.",
            "This is a defect of the trace; report it with the model's config.json.",
        )
    return owner.layer


def _widened(groups: tuple[CacheGroup, ...], layers: Iterable[AttentionSpec]) -> tuple[CacheGroup, ...]:
    """Keep the pages of a group whose readers see further back than its owners."""
    by_index = {layer.layer: layer for layer in layers}
    kept: list[CacheGroup] = []
    for group in groups:
        readers = [by_index[reader] for reader, _ in group.shared]
        owner = by_index[group.layers[0]]
        if all((reader.window, reader.chunk) == (owner.window, owner.chunk) for reader in readers):
            kept.append(group)
        else:
            kept.append(replace(group, kind="full", window=0))
    return tuple(kept)


def _describe(index: int, group: CacheGroup) -> Decision:
    layers = ", ".join(str(layer) for layer in group.layers)
    seen = "all tokens" if group.kind == "full" else f"a {group.kind} of {group.window} tokens"
    readers = (
        f", read by layers {', '.join(str(reader) for reader, _ in group.shared)} too" if group.shared else ""
    )
    scaled = " with a scale for each token and head" if group.scales else ""
    return Decision(
        subject=f"cache group {index}",
        choice=f"{group.dtype}{scaled}, pages of {group.page_tokens} tokens, {group.page_bytes} bytes each",
        reason=f"layers {layers} have {group.num_kv_heads} KV heads of {group.k_dim} and see {seen}{readers}",
    )
