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


def overdue_first(order: Order, max_wait_s: float) -> Order:
    """`order` behind a first class for requests that have waited `max_wait_s` or more, as they came."""

    def key(waiting: WaitingRequest, now_s: float) -> SortKey:
        if is_overdue(waiting, now_s, max_wait_s):
            return (0.0, *fcfs(waiting, now_s))
        return (1.0, *order(waiting, now_s))

    return key


def is_overdue(waiting: WaitingRequest, now_s: float, max_wait_s: float | None) -> bool:
    """Whether a request has waited as long as it may be passed by others; None is for ever."""
    return max_wait_s is not None and now_s - waiting.request.arrival_s >= max_wait_s


def make_order(name: str, max_wait_s: float | None = None) -> Order:
    """The policy called `name` in RuntimeConfig.order. Priorities outrank past preemption; having waited
    for `max_wait_s` outranks priorities."""
    order = {"priority": priority, "hrrn": hrrn, "fcfs": fcfs}[name]
    if max_wait_s is not None:
        order = overdue_first(order, max_wait_s)
    return order if name == "priority" else preempted_first(order)
