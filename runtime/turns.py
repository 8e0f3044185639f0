"""In which turn waiting requests are offered to one step: between keys by what they were served, within a key
by the order. Decides over a copy of the counters; nothing is charged here for good."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from .fairness import FairShare
from .order import SortKey
from .request import WaitingRequest


class _Group(NamedTuple):
    """Requests that are compared by the order alone. `key` is None for preempted ones, which were charged
    when they first ran and come back before anybody new; `is_long` for those that the lane may hold back."""

    key: str | None
    is_long: bool


class Turns:
    """Gives out waiting requests one by one; each that is admitted must be charged before the next.

    With at most one key among `waiting`, or without `fairness`, this is `rank` alone.
    """

    def __init__(
        self,
        waiting: Collection[WaitingRequest],
        rank: Callable[[WaitingRequest], SortKey],
        is_long: Callable[[WaitingRequest], bool],
        fairness: FairShare | None,
    ) -> None:
        keys = {each.request.key for each in waiting} if fairness is not None else {""}
        self._fairness = fairness if len(keys) > 1 else None
        self._heaps: dict[_Group, list[tuple[SortKey, WaitingRequest]]] = {}
        for request in waiting:
            group = _Group(self._key_of(request), is_long(request))
            self._heaps.setdefault(group, []).append((rank(request), request))
        for heap in self._heaps.values():
            heapq.heapify(heap)
        self._served: dict[str | None, float] = {None: -math.inf}
        if self._fairness is not None:
            self._served.update({key: self._fairness.served(key) for key in keys})

    def take(self, with_long: bool = True) -> WaitingRequest | None:
        """The next request, long ones left out unless `with_long`. None when there is none."""
        groups = [group for group in self._heaps if with_long or not group.is_long]
        if not groups:
            return None
        group = min(groups, key=lambda each: (self._served[each.key], self._heaps[each][0][0]))
        heap = self._heaps[group]
        request = heapq.heappop(heap)[1]
        if not heap:
            del self._heaps[group]
        return request

    def charge(self, request: WaitingRequest, num_tokens: int) -> None:
        """`request` is admitted with `num_tokens` to compute."""
        key = self._key_of(request)
        if self._fairness is not None and key is not None:
            self._served[key] += self._fairness.prompt_weight * num_tokens

    def _key_of(self, request: WaitingRequest) -> str | None:
        return None if self._fairness is None or request.num_preemptions else request.request.key
