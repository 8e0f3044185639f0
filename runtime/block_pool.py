"""Physical pages of one cache group: who refers to each, which may be handed out, which still carry content
worth keeping. Knows no sequence and no token."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import IntEnum

from ..spec.errors import InternalError


class Place(IntEnum):
    """Where a page is. RETIRING pages have no reference, but a step still running may write them."""

    FREE = 0
    CACHED = 1
    RETIRING = 2
    USED = 3


class BlockPool:
    """Reference-counted pages with an LRU of unreferenced ones that the prefix index still points to.

    Pages given back while steps are in flight are handed out again only once those have retired.
    `on_evict` is told of a page that loses its indexed content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._place = [Place.FREE] * num_blocks
        self._indexed = bytearray(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._retiring: deque[tuple[int, int]] = deque()
        self._released_in = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages somebody refers to."""
        return sum(1 for place in self._place if place is Place.USED)

    def allocate(self) -> int:
        """A page with one reference; the least recently used cached page when none is free."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._indexed[block] = 0
            self._on_evict(block)
        else:
            raise InternalError(
                "runtime.no_free_block",
                "A page was asked for when none was left.",
                "A step was planned beyond the pages that were available.",
                "Report this with the request mix that led to it.",
            )
        self._refs[block] = 1
        self._place[block] = Place.USED
        return block

    def acquire(self, block: int) -> None:
        """One more reference to a page whose content is indexed."""
        if self._place[block] is Place.CACHED:
            del self._cached[block]
        self._place[block] = Place.USED
        self._refs[block] += 1

    def release(self, block: int, epoch: int | None) -> None:
        """One reference less. `epoch` is the newest step in flight, None when none is."""
        self._refs[block] -= 1
        if self._refs[block] > 0:
            return
        if epoch is None:
            self._put_away(block)
        else:
            self._place[block] = Place.RETIRING
            self._released_in[block] = epoch
            self._retiring.append((epoch, block))

    def retire(self, epoch: int) -> None:
        """All steps up to `epoch` are over."""
        while self._retiring and self._retiring[0][0] <= epoch:
            released_in, block = self._retiring.popleft()
            if self._place[block] is Place.RETIRING and self._released_in[block] == released_in:
                self._put_away(block)

    def index(self, block: int) -> None:
        """The prefix index now points to this page."""
        self._indexed[block] = 1

    def forget(self, block: int) -> None:
        """The prefix index no longer points to this page."""
        self._indexed[block] = 0
        if self._place[block] is Place.CACHED:
            del self._cached[block]
            self._place[block] = Place.FREE
            self._free.append(block)

    def is_indexed(self, block: int) -> bool:
        return bool(self._indexed[block])

    def count_available(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are now counted as available, and would no longer be when acquired."""
        return sum(1 for block in blocks if block >= 0 and self._place[block] is Place.CACHED)

    def count_sole(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have one reference only."""
        return sum(1 for block in blocks if block >= 0 and self._refs[block] == 1)

    def check(self) -> None:
        """Raises InternalError when the books do not balance. For tests and the watchdog."""
        counts = [self._place.count(place) for place in Place]
        referenced = sum(1 for refs in self._refs if refs > 0)
        balanced = (
            counts[Place.FREE] == len(self._free) == len(set(self._free))
            and counts[Place.CACHED] == len(self._cached)
            and counts[Place.USED] == referenced
            and min(self._refs, default=0) >= 0
        )
        if not balanced:
            raise InternalError(
                "runtime.block_books",
                f"The page books do not balance: {counts} pages free, cached, retiring, used.",
                f"{len(self._free)} are listed free, {len(self._cached)} cached, {referenced} referenced.",
                "Report this with the request mix that led to it.",
            )

    def _put_away(self, block: int) -> None:
        if self._indexed[block]:
            self._place[block] = Place.CACHED
            self._cached[block] = None
        else:
            self._place[block] = Place.FREE
            self._free.append(block)
