"""The paged KV cache's books: block tables of sequences over all cache groups, sharing through the prefix
index, and what may be handed out. Integers only; no executor, no order of requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..spec.cache import CacheLayout
from ..spec.errors import InternalError
from .block_pool import BlockPool
from .prefix import Node, PrefixHit, PrefixIndex, PrefixStats
from .visibility import first_visible, most_pages, most_tokens


class SequenceBlocks:
    """The pages of one running sequence. `tables[group][i]` holds tokens i * page_tokens onwards, -1 when
    the window has passed it. `unsent` are (group, index, page) an executor has not been told of."""

    __slots__ = ("capacity", "node", "num_freed", "num_published", "tables", "unsent")

    def __init__(self, tables: list[list[int]], node: Node, num_published: int) -> None:
        self.tables = tables
        self.node = node
        self.num_published = num_published
        self.num_freed = [0] * len(tables)
        self.capacity = 0
        self.unsent = [
            (group, index, page)
            for group, table in enumerate(tables)
            for index, page in enumerate(table)
            if page >= 0
        ]


class BlockManager:
    """Pages of every cache group under one roof: a pool each, and one prefix index over all.

    Steps are announced by `begin_epoch` and `retire_epoch`, in order; pages given back between the two
    wait for the second.
    """

    def __init__(self, layout: CacheLayout, num_blocks: Sequence[int], prefix_cache: bool = True) -> None:
        if len(num_blocks) != len(layout.groups) or not layout.groups:
            raise InternalError(
                "runtime.cache_groups",
                f"{len(num_blocks)} page counts were given for {len(layout.groups)} cache groups.",
                "An executor must state the number of pages of each group.",
                "Report this with the artifact's manifest.",
            )
        self.groups = layout.groups
        self.prefix_cache = prefix_cache
        self._index = PrefixIndex(layout.groups)
        self._pools = [
            BlockPool(count, partial(self._evicted, group)) for group, count in enumerate(num_blocks)
        ]
        self._sliding = [(index, group) for index, group in enumerate(self.groups) if group.kind != "full"]
        self._begun = 0
        self._retired = 0

    @property
    def stats(self) -> PrefixStats:
        return self._index.stats

    @property
    def max_sequence_tokens(self) -> int | None:
        """The longest sequence that fits when it runs alone; None when nothing bounds it."""
        bounds = [
            most_tokens(group, pool.num_blocks) for group, pool in zip(self.groups, self._pools, strict=True)
        ]
        return min((bound for bound in bounds if bound is not None), default=None)

    def available(self) -> list[int]:
        """Pages per group that can be handed out now."""
        return [pool.num_available for pool in self._pools]

    def used(self) -> list[int]:
        """Pages per group that sequences refer to."""
        return [pool.num_used for pool in self._pools]

    def begin_epoch(self, epoch: int) -> None:
        """A step was submitted."""
        self._begun = epoch

    def retire_epoch(self, epoch: int) -> None:
        """The step, and all before it, are over."""
        self._retired = epoch
        for pool in self._pools:
            pool.retire(epoch)

    def lookup(self, token_ids: Sequence[int]) -> PrefixHit:
        """What of a sequence is cached; at least its last token is left to compute. Changes nothing."""
        return self._index.lookup(token_ids, len(token_ids) - 1 if self.prefix_cache else 0)

    def cost(self, hit: PrefixHit, num_tokens: int, num_new: int) -> list[int]:
        """Pages per group that would stop being available were a sequence of `num_tokens` tokens opened
        at `hit` and computed in steps of at most `num_new`."""
        costs: list[int] = []
        for group, pool, pages in zip(self.groups, self._pools, hit.pages, strict=True):
            held = sum(1 for page in pages if page >= 0)
            fresh = max(0, most_pages(group, num_tokens, num_new) - held)
            costs.append(fresh + pool.count_available(pages))
        return costs

    def hit_cost(self, hit: PrefixHit) -> list[int]:
        """Pages per group that are available now and would not be once `hit` is opened."""
        return [pool.count_available(pages) for pool, pages in zip(self._pools, hit.pages, strict=True)]

    def open(self, hit: PrefixHit, num_tokens: int) -> SequenceBlocks:
        """A sequence that starts with the pages of `hit`. `num_tokens` is its length, for the accounting."""
        for pool, pages in zip(self._pools, hit.pages, strict=True):
            for page in pages:
                if page >= 0:
                    pool.acquire(page)
        if self.prefix_cache:
            self.stats.query_tokens += num_tokens
            self.stats.hit_tokens += hit.num_tokens
        hit.node.num_pins += 1
        blocks = SequenceBlocks(
            [list(pages) for pages in hit.pages], hit.node, hit.num_tokens // self._index.span
        )
        for group, pages in enumerate(hit.pages):
            blocks.num_freed[group] = next((i for i, page in enumerate(pages) if page >= 0), len(pages))
        blocks.capacity = self._capacity(blocks)
        return blocks

    def missing(self, blocks: SequenceBlocks, num_tokens: int) -> list[int]:
        """Pages per group that `blocks` lacks to hold `num_tokens` tokens."""
        return [
            max(0, group.pages_for(num_tokens) - len(table))
            for group, table in zip(self.groups, blocks.tables, strict=True)
        ]

    def most_within(self, num_pages: Sequence[int], available: Sequence[int]) -> int:
        """How many tokens a sequence with tables of `num_pages` entries can hold given more pages."""
        return min(
            (have + more) * group.page_tokens
            for group, have, more in zip(self.groups, num_pages, available, strict=True)
        )

    def extend(self, blocks: SequenceBlocks, num_tokens: int) -> None:
        """Makes room for `num_tokens` tokens. InternalError when pages run out: plan by `available`."""
        if num_tokens <= blocks.capacity:
            return
        for group_idx, (group, table) in enumerate(zip(self.groups, blocks.tables, strict=True)):
            pool = self._pools[group_idx]
            for index in range(len(table), group.pages_for(num_tokens)):
                page = pool.allocate()
                table.append(page)
                blocks.unsent.append((group_idx, index, page))
        blocks.capacity = self._capacity(blocks)

    def commit(self, blocks: SequenceBlocks, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` tokens are computed: full spans enter the index, and pages that no
        later query sees are given back."""
        if num_computed // self._index.span > blocks.num_published:
            self._publish(blocks, token_ids, num_computed // self._index.span)
        for group_idx, group in self._sliding:
            first = first_visible(group, num_computed) // group.page_tokens
            if first > blocks.num_freed[group_idx]:
                self._slide(blocks, group_idx, first)

    def releasable(self, blocks: SequenceBlocks) -> list[int]:
        """Pages per group that would come back were the sequence closed."""
        return [pool.count_sole(table) for pool, table in zip(self._pools, blocks.tables, strict=True)]

    def close(self, blocks: SequenceBlocks) -> None:
        """Gives all pages back, the last first, so that the start of a prompt stays cached longest."""
        epoch = self._in_flight_epoch()
        for pool, table in zip(self._pools, blocks.tables, strict=True):
            for page in reversed(table):
                if page >= 0:
                    pool.release(page, epoch)
            table.clear()
        blocks.capacity = 0
        blocks.node.num_pins -= 1
        self._index.prune(blocks.node)

    def check(self) -> None:
        """Raises InternalError when the books of any pool do not balance."""
        for pool in self._pools:
            pool.check()

    def _capacity(self, blocks: SequenceBlocks) -> int:
        return min(
            len(table) * group.page_tokens for group, table in zip(self.groups, blocks.tables, strict=True)
        )

    def _in_flight_epoch(self) -> int | None:
        return self._begun if self._begun > self._retired else None

    def _publish(self, blocks: SequenceBlocks, token_ids: Sequence[int], num_spans: int) -> None:
        if not self.prefix_cache:
            blocks.num_published = num_spans
            return
        span = self._index.span
        before = blocks.node
        for index in range(blocks.num_published, num_spans):
            node = self._index.child(blocks.node, tuple(token_ids[index * span : (index + 1) * span]))
            blocks.node = node
            for group_idx, group in enumerate(self.groups):
                per_span = span // group.page_tokens
                pages = tuple(blocks.tables[group_idx][index * per_span : (index + 1) * per_span])
                if min(pages) >= 0 and self._index.publish(node, group_idx, pages):
                    for page in pages:
                        self._pools[group_idx].index(page)
        blocks.node.num_pins += 1
        before.num_pins -= 1
        blocks.num_published = num_spans
        self._index.prune(before)

    def _slide(self, blocks: SequenceBlocks, group_idx: int, first: int) -> None:
        """Gives back the pages before entry `first`."""
        table = blocks.tables[group_idx]
        epoch = self._in_flight_epoch()
        end = min(first, len(table))
        for index in range(blocks.num_freed[group_idx], end):
            if table[index] >= 0:
                self._pools[group_idx].release(table[index], epoch)
                table[index] = -1
                blocks.unsent.append((group_idx, index, -1))
        blocks.num_freed[group_idx] = end

    def _evicted(self, group: int, page: int) -> None:
        for other in self._index.withdraw(group, page):
            self._pools[group].forget(other)
