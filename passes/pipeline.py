"""The default pipeline as a table of contents: which passes stand in which stage, in which order."""

from __future__ import annotations

from .base import Pass
from .canonical import canonical_passes
from .fuse_add_norm import FuseAddNorm
from .fuse_gate_up import FuseGateUp
from .fuse_qkv import FuseQkv
from .fuse_rope_cache import FuseRopeCache
from .kv_layout import KvLayout
from .memory_plan import PlanMemory
from .paged_attention import PagedAttention
from .quantize.rtn import Rtn
from .select_kernels import SelectKernels


def canonicalise() -> tuple[Pass, ...]:
    """From the traced graph to the vocabulary that all later passes look for."""
    return canonical_passes()


def fuse() -> tuple[Pass, ...]:
    """Fewer, larger operators. None of these must match: a model may have no gate and no bias."""
    return (
        # projections of one input become one product
        FuseQkv(),
        FuseGateUp(),
        # the residual stream is read once where it is added to and normalised
        FuseAddNorm(),
    )


def quantise(bits: int, group_size: int) -> tuple[Pass, ...]:
    """Weights to codes; head and embedding stay at 8 bits, which costs little and keeps the ranking."""
    return (Rtn(bits=bits, group_size=group_size, head_bits=8, embedding_bits=8, expect=1),)


def layout() -> tuple[Pass, ...]:
    """From whole sequences to a paged cache: what a server runs."""
    return (
        KvLayout(expect=1),
        PagedAttention(expect=1),
        # needs the cache writes that the pass before makes
        FuseRopeCache(),
    )


def plan() -> tuple[Pass, ...]:
    """By which kernels the finished program runs, and what it will need."""
    return (SelectKernels(), PlanMemory())


# Every pass of llmc, in the order above.
BUILT_IN: tuple[type[Pass], ...] = tuple(
    type(pass_) for pass_ in (*canonicalise(), *fuse(), *quantise(4, 32), *layout(), *plan())
)
