"""The prefix index: which pages hold the keys and values of which token chain. Knows chains and page
numbers; references, eviction order and free pages are the pool's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..spec.cache import CacheGroup
from .visibility import first_visible


@dataclass(slots=True, eq=False)
class Node:
    """One span of tokens behind the chain of its parents.

    The way from the root is the chain: a child is found by hash of the span's token ids and compared by
    the ids themselves, so equal nodes mean equal prefixes, never equal hashes only. `pages` are, per
    cache group, the pages that hold the span, or None. `num_pins` counts sequences that will add
    children.
    """

    parent: Node | None = None
    token_ids: tuple[int, ...] = ()
    children: dict[tuple[int, ...], Node] = field(default_factory=dict[tuple[int, ...], "Node"])
    pages: list[tuple[int, ...] | None] = field(default_factory=list[tuple[int, ...] | None])
    num_pins: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """The longest indexed prefix of a sequence: its tokens, its pages per group (-1 where the group's
    window has passed) and the chain's last node."""

    num_tokens: int
    pages: tuple[tuple[int, ...], ...]
    node: Node


@dataclass(slots=True)
class PrefixStats:
    """Tokens asked for and found since the start; counted when a request is admitted."""

    query_tokens: int = 0
    hit_tokens: int = 0


class PrefixIndex:
    """A tree of spans. A span is as long as the smallest number of whole pages common to all groups."""

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        self._groups = tuple(groups)
        self.span = math.lcm(*(group.page_tokens for group in groups))
        self._owner: dict[tuple[int, int], Node] = {}
        self.root = Node(pages=[None] * len(self._groups))
        self.stats = PrefixStats()

    def lookup(self, token_ids: Sequence[int], limit: int) -> PrefixHit:
        """The longest prefix of at most `limit` tokens whose visible pages are there in every group.
        Changes nothing."""
        path = self._walk(token_ids, limit)
        length = len(path)
        while length > 0 and not all(
            self._covers(path, index, length)
            for index, group in enumerate(self._groups)
            if group.kind != "full"
        ):
            length -= 1
        pages = tuple(self._pages_of(path[:length], index) for index in range(len(self._groups)))
        return PrefixHit(
            num_tokens=length * self.span, pages=pages, node=path[length - 1] if length else self.root
        )

    def child(self, parent: Node, token_ids: tuple[int, ...]) -> Node:
        """The node of one more span, made when it is not there."""
        node = parent.children.get(token_ids)
        if node is None:
            node = Node(parent=parent, token_ids=token_ids, pages=[None] * len(self._groups))
            parent.children[token_ids] = node
        return node

    def publish(self, node: Node, group: int, pages: tuple[int, ...]) -> bool:
        """These pages hold the node's span. False when others already do: the first stay."""
        if node.pages[group] is not None:
            return False
        node.pages[group] = pages
        for page in pages:
            self._owner[group, page] = node
        return True

    def withdraw(self, group: int, page: int) -> tuple[int, ...]:
        """A page is reused: its span is no longer held in this group. Returns the span's other pages."""
        node = self._owner[group, page]
        pages = node.pages[group] or ()
        for each in pages:
            del self._owner[group, each]
        node.pages[group] = None
        self.prune(node)
        return tuple(each for each in pages if each != page)

    def prune(self, node: Node) -> None:
        """Drops nodes that hold nothing and lead nowhere, from `node` upwards."""
        while (
            node.parent is not None
            and not node.children
            and not node.num_pins
            and not any(pages is not None for pages in node.pages)
        ):
            parent = node.parent
            parent.children.pop(node.token_ids, None)
            node.parent = None
            node = parent

    def _walk(self, token_ids: Sequence[int], limit: int) -> list[Node]:
        full = [index for index, group in enumerate(self._groups) if group.kind == "full"]
        path: list[Node] = []
        node = self.root
        for start in range(0, limit - limit % self.span, self.span):
            child = node.children.get(tuple(token_ids[start : start + self.span]))
            if child is None or any(child.pages[index] is None for index in full):
                break
            path.append(child)
            node = child
        return path

    def _covers(self, path: list[Node], group: int, length: int) -> bool:
        """Whether what a query behind `length` spans sees is all there."""
        first = first_visible(self._groups[group], length * self.span) // self.span
        return all(path[index].pages[group] is not None for index in range(first, length))

    def _pages_of(self, path: list[Node], group: int) -> tuple[int, ...]:
        spec = self._groups[group]
        first = first_visible(spec, len(path) * self.span) // self.span
        absent = (-1,) * (self.span // spec.page_tokens)
        pages: list[int] = []
        for index, node in enumerate(path):
            pages.extend(absent if index < first else node.pages[group] or absent)
        live = first_visible(spec, len(path) * self.span) // spec.page_tokens
        return (-1,) * min(live, len(pages)) + tuple(pages[live:])
