"""Where drafts come from: the text so far, or the executor's draft model. A draft may be anything; what is
accepted is decided where tokens are sampled, so nothing here can change an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .protocol import Executor
from .request import RunningRequest


class Proposer(Protocol):
    """Proposes up to `k` tokens for each request; a request it has no idea for is left out."""

    def propose(
        self, requests: Sequence[RunningRequest], k: int
    ) -> dict[RunningRequest, tuple[int, ...]]: ...

    def forget(self, request_id: int) -> None:
        """The request ended or lost its row."""
        ...


class NgramIndex:
    """Where each n-gram of a growing token list occurred last, for n from `min_n` to `max_n`."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._sizes = range(max_n, min_n - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, token_ids: Sequence[int], k: int) -> tuple[int, ...]:
        """The `k` tokens that followed the latest earlier occurrence of the longest matching suffix
        (prompt lookup, Saxena 2023); a match that reaches the end continues into its own copy."""
        self._extend(token_ids)
        length = len(token_ids)
        for size in self._sizes:
            start = self._next.get(tuple(token_ids[-size:])) if length > size else None
            if start is not None:
                if start + k <= length:
                    return tuple(token_ids[start : start + k])
                draft = list(token_ids[start:])
                while len(draft) < k:
                    draft.append(draft[start - length])
                return tuple(draft)
        return ()

    def _extend(self, token_ids: Sequence[int]) -> None:
        """Indexes every n-gram that some token follows."""
        following = self._next
        for end in range(max(1, self._num_indexed), len(token_ids)):
            for size in self._sizes:
                if end >= size:
                    following[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)


class NgramProposer:
    """Prompt lookup: drafts are copied from earlier in the same request."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n = min_n
        self._max_n = max_n
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, requests: Sequence[RunningRequest], k: int) -> dict[RunningRequest, tuple[int, ...]]:
        drafts: dict[RunningRequest, tuple[int, ...]] = {}
        for request in requests:
            request_id = request.request.request_id
            index = self._indexes.get(request_id)
            if index is None:
                index = self._indexes[request_id] = NgramIndex(self._min_n, self._max_n)
            draft_ids = index.propose(request.token_ids, k)
            if draft_ids:
                drafts[request] = draft_ids
        return drafts

    def forget(self, request_id: int) -> None:
        self._indexes.pop(request_id, None)


class DraftProposer:
    """Drafts from the executor's own draft model, one call for all rows."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def propose(self, requests: Sequence[RunningRequest], k: int) -> dict[RunningRequest, tuple[int, ...]]:
        if not requests:
            return {}
        drafts = self._executor.propose([request.row for request in requests], k)
        return {
            request: draft_ids
            for request, draft_ids in zip(requests, drafts.token_ids, strict=True)
            if draft_ids
        }

    def forget(self, request_id: int) -> None:
        """Rows tell the executor all it needs."""
