"""How many KV pages each cache group gets, from a number of bytes. Pure arithmetic; reads no machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spec.cache import CacheLayout
from ..spec.errors import TargetError
from .config import RuntimeConfig
from .visibility import most_pages

# Without a stated size the cache takes at most this share of the memory that is available.
DEFAULT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDemand:
    """What the cache is for: up to `max_requests` sequences of `max_model_len` tokens each, which enter in
    steps of at most `max_step_tokens` tokens."""

    max_requests: int
    max_model_len: int
    max_step_tokens: int

    def pages_per_sequence(self, layout: CacheLayout) -> tuple[int, ...]:
        """Pages of each group that one longest sequence holds at most."""
        return tuple(most_pages(group, self.max_model_len, self.max_step_tokens) for group in layout.groups)


def demand_of(config: RuntimeConfig, max_context: int, max_step_tokens: int | None = None) -> CacheDemand:
    """What `config` asks of the cache of a model with `max_context`, in steps of `max_step_tokens` where the
    executor takes fewer than the configuration allows."""
    return CacheDemand(
        max_requests=config.max_requests,
        max_model_len=min(config.max_model_len or max_context, max_context),
        max_step_tokens=max_step_tokens or config.max_step_tokens,
    )


def num_pages(
    layout: CacheLayout,
    demand: CacheDemand,
    cache_bytes: int,
    available_bytes: int,
    share: float = DEFAULT_SHARE,
) -> tuple[int, ...]:
    """Physical pages per group.

    `cache_bytes` are divided so that every group has room for the same number of longest sequences. 0
    means enough for all requests at full length, at most `share` of `available_bytes`, and at
    least one sequence. Raises TargetError when a group would get no page at all.
    """
    per_sequence = demand.pages_per_sequence(layout)
    sequence_bytes = bytes_of(layout, per_sequence)
    if cache_bytes == 0:
        most = int(available_bytes * share)
        cache_bytes = max(sequence_bytes, min(demand.max_requests * sequence_bytes, most))
    pages = tuple(count * cache_bytes // sequence_bytes for count in per_sequence)
    if 0 in pages:
        raise TargetError(
            "target.cache_too_small",
            f"The KV cache of {cache_bytes} bytes is too small.",
            f"A sequence of {demand.max_model_len} tokens needs {sequence_bytes} bytes, "
            "and not every cache group gets a page.",
            f"Give it at least {sequence_bytes} bytes, or lower max_model_len.",
        )
    return pages


def bytes_of(layout: CacheLayout, pages: Sequence[int]) -> int:
    """Bytes of `pages[g]` pages in each group g."""
    return sum(count * group.page_bytes for count, group in zip(pages, layout.groups, strict=True))
