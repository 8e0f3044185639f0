"""In which order waiting requests are admitted. One function a policy, from a request and the time to a sort
key; nothing here knows rows, pages or budgets."""

from __future__ import annotations

from collections.abc import Callable

from .request import WaitingRequest

SortKey = tuple[float, ...]
Order = Callable[[WaitingRequest, float], SortKey]


def fcfs(waiting: WaitingRequest, now_s: float) -> SortKey:
    """First come, first served."""
    del now_s
    return (waiting.request.arrival_s, waiting.request.request_id)


def hrrn(waiting: WaitingRequest, now_s: float) -> SortKey:
    """Highest response ratio next (Brinch Hansen 1971): waiting time over service time, the latter
    taken as proportional to the tokens that are not cached. Short requests pass long ones, and every
    request overtakes later ones in the end, however long it is."""
    service = max(1, waiting.num_uncached)
    waited_s = max(0.0, now_s - waiting.request.arrival_s)
    return (-waited_s / service, service, waiting.request.arrival_s, waiting.request.request_id)


def priority(waiting: WaitingRequest, now_s: float) -> SortKey:
    """The lowest priority number first, equals as they came."""
    return (waiting.request.priority, *fcfs(waiting, now_s))


def preempted_first(order: Order) -> Order:
    """`order` behind a first class for requests that ran before and were preempted."""

    def key(waiting: WaitingRequest, now_s: float) -> SortKey:
        return (0.0 if waiting.num_preemptions else 1.0, *order(waiting, now_s))

    return key


def make_order(name: str) -> Order:
    """The policy called `name` in RuntimeConfig.order. Priorities outrank past preemption."""
    if name == "priority":
        return priority
    return preempted_first({"hrrn": hrrn, "fcfs": fcfs}[name])
