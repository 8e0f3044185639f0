"""How much of an artifact a given memory serves: arithmetic over its memory plan and its cache layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..spec.cache import CacheLayout
from ..spec.plans import MemoryPlan
from .page_budget import CacheDemand, bytes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether an artifact can run in `memory_bytes`, and how much at a time: `cache_tokens` tokens over all
    requests, or `requests` of `tokens_per_request` each (0 when not even one fits), which take
    `request_bytes` each."""

    fits: bool
    memory_bytes: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes_per_token: int
    cache_tokens: int
    request_bytes: int
    requests: int
    tokens_per_request: int

    @property
    def needed_bytes(self) -> int:
        """The least memory that serves one request."""
        return self.weight_bytes + self.activation_bytes + self.request_bytes

    def sentence(self) -> str:
        """The same in words."""
        if not self.fits:
            need = self.weight_bytes + self.activation_bytes
            return f"does not fit: weights and activations take {need} of {self.memory_bytes} bytes"
        if self.requests:
            return f"fits: {self.requests} requests x {self.tokens_per_request} tokens at a time"
        return f"fits, with {self.cache_tokens} tokens of cache: less than one full context"


def fit_within(plan: MemoryPlan, cache: CacheLayout, tokens: int, memory_bytes: int) -> Fit:
    """What of a model with `plan` and `cache` can be served in `memory_bytes`, in requests of `tokens`
    tokens: whole pages, and of windows no more than a step needs."""
    cache_tokens = plan.cache_tokens_within(memory_bytes)
    demand = CacheDemand(max_requests=1, max_model_len=tokens, max_step_tokens=plan.max_tokens)
    each = bytes_of(cache, demand.pages_per_sequence(cache))
    left = memory_bytes - plan.weight_bytes - plan.activation_bytes
    return Fit(
        fits=cache_tokens > 0,
        memory_bytes=memory_bytes,
        weight_bytes=plan.weight_bytes,
        activation_bytes=plan.activation_bytes,
        cache_bytes_per_token=plan.cache_bytes_per_token,
        cache_tokens=cache_tokens,
        request_bytes=each,
        requests=max(0, left // max(1, each)),
        tokens_per_request=tokens,
    )


def longest_request(plan: MemoryPlan, cache: CacheLayout, most: int, memory_bytes: int) -> int:
    """The most tokens, up to `most`, of one request that fits; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fit_within(plan, cache, middle, memory_bytes).requests:
            low = middle
        else:
            high = middle - 1
    return low


def ways_to_fit(plan: MemoryPlan, cache: CacheLayout, tokens: int, memory_bytes: int) -> tuple[str, ...]:
    """Three ways for an artifact of which not one request of `tokens` tokens fits, each with its number."""
    need = fit_within(plan, cache, tokens, memory_bytes).needed_bytes
    longest, half = longest_request(plan, cache, tokens, memory_bytes), max(1, tokens // 2)
    shorter = fit_within(plan, cache, half, memory_bytes).needed_bytes
    coded = CacheLayout(groups=tuple(replace(group, dtype="int8", scales=True) for group in cache.groups))
    smaller = fit_within(plan, coded, tokens, memory_bytes).needed_bytes
    return (
        f"give it {size_text(need)} of memory",
        f"serve at most {longest} tokens (--max-model-len {longest})"
        if longest
        else f"serve {half} tokens (--max-model-len {half}) in {size_text(shorter)}",
        f"compile it with --kv-dtype int8: {size_text(smaller)} for {tokens} tokens"
        if smaller < need
        else f"compile it with fewer bits than the {size_text(plan.weight_bytes)} of weights it has: "
        "`llmc inspect MODEL --fit` says which are enough",
    )


def size_text(count: int, digits: int = 2) -> str:
    """A size rounded up to so many digits of a GiB, or below one of a MiB: as much as is told is enough."""
    size, name = unit_of(count)
    return f"{math.ceil(10**digits * count / size) / 10**digits:.{digits}f} {name}"


def unit_of(count: int) -> tuple[int, str]:
    """The unit that a size of memory is told in: its bytes, and its name."""
    return (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
