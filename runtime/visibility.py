"""Which cached positions a query still sees, by kind of cache group. Pure arithmetic."""

from __future__ import annotations

from ..spec.cache import CacheGroup


def first_visible(group: CacheGroup, position: int) -> int:
    """The first position whose key a query at `position` sees."""
    if group.kind == "window":
        return max(0, position - group.window + 1)
    if group.kind == "chunk":
        return position - position % group.window
    return 0


def most_tokens(group: CacheGroup, num_blocks: int) -> int | None:
    """The longest sequence that `num_blocks` pages can carry alone; None when there is no bound,
    because pages come back as the window moves on (one token a step needs window + 1 page)."""
    if group.kind != "full" and num_blocks >= group.pages_for(group.window) + 1:
        return None
    return num_blocks * group.page_tokens


def most_pages(group: CacheGroup, num_tokens: int, num_new: int) -> int:
    """The most pages a sequence of `num_tokens` tokens holds at one time when its steps take at most
    `num_new` tokens."""
    whole = group.pages_for(num_tokens)
    if group.kind == "full":
        return whole
    return min(whole, group.pages_for(group.window + num_new) + 1)
