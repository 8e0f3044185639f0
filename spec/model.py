"""Facts about a source model, as frozen data. Knows no graph, no weights, no target."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one attention layer computes.

    `window` > 0: a query at position p sees keys in (p - window, p]; `chunk` > 0: only keys in the
    same absolute chunk of that many positions; 0 means neither. `softcap` 0.0 means none.
    `kv_source` is the layer whose cache is read: `layer` itself unless KV is shared.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    kv_source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts of one model, read once at trace time and stored in the artifact.

    `compute_dtype` is the dtype the graph was traced in (`float32`, `bfloat16`, `float16`);
    `max_context` is in tokens; `choices` records compile-time decisions that change outputs
    (for example `{"longrope": "short factors, max_context 4096 <= 4096"}`).
    """

    family: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    compute_dtype: str
    tied_head: bool
    num_parameters: int
    attention: tuple[AttentionSpec, ...]
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    choices: dict[str, str] = field(default_factory=dict[str, str])
