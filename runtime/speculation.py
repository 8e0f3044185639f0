"""Where drafts come from, the text so far or the executor's draft model, and how many are worth it. What
is accepted is decided where tokens are sampled: nothing here can change an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..spec.errors import UsageError
from .config import RuntimeConfig
from .draft_policy import DraftPolicy, SpeculationCosts
from .protocol import Executor
from .request import RunningRequest
from .scheduler import Chunk

# Steps between two looks for drafts of which none was worth its time; and between two questions whether a
# draft model would be, which takes a hundredth of a small model's step.
MOST_REST = 15
QUESTION_REST = 7
# Looking where nothing is found takes as long: one more step passes between two looks each time that so many
# in a row have found nothing, up to a number that delays no draft by much.
MISSES, MOST_MISS_REST = 4, 3


class Proposer(Protocol):
    """Proposes up to `k` tokens for each request; a request it has no idea for is left out. Where proposing
    `is_free`, how many drafts to verify is decided when they are there."""

    @property
    def is_free(self) -> bool: ...

    def propose(
        self, requests: Sequence[RunningRequest], k: int
    ) -> dict[RunningRequest, tuple[int, ...]]: ...

    def forget(self, request_id: int) -> None:
        """The request ended or lost its row."""
        ...


class NgramIndex:
    """Where each n-gram of a growing token list occurred last, for n from `min_n` to `max_n`. Tokens are only
    ever appended between calls."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._sizes = range(max_n, min_n - 1, -1)
        self._longest = max_n
        self._next: dict[tuple[int, ...], int] = {}
        self._length = 0
        self._found = -1

    def propose(self, token_ids: Sequence[int], k: int) -> tuple[int, ...]:
        """The `k` tokens that followed the latest earlier occurrence of the longest matching suffix
        (prompt lookup, Saxena 2023); a match that reaches the end continues into its own copy."""
        length = len(token_ids)
        if length != self._length:
            self._extend(token_ids, length)
        start = self._found
        if start < 0:
            return ()
        if start + k <= length:
            return tuple(token_ids[start : start + k])
        draft = list(token_ids[start:])
        while len(draft) < k:
            draft.append(draft[start - length])
        return tuple(draft)

    def _extend(self, token_ids: Sequence[int], length: int) -> None:
        """Indexes every n-gram by where what follows it stands, or will stand; finds the longest of the last
        ones that was there before."""
        following, found = self._next, -1
        for end in range(self._length + 1, length):
            for size in self._sizes:
                if size <= end:
                    following[tuple(token_ids[end - size : end])] = end
        longest = tuple(token_ids[-self._longest :])
        for size in self._sizes:
            if size <= length:
                suffix = longest[-size:]
                if found < 0:
                    found = following.get(suffix, -1)
                following[suffix] = length
        self._length, self._found = length, found


class NgramProposer:
    """Prompt lookup: drafts are copied from earlier in the same request."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n = min_n
        self._max_n = max_n
        self._indexes: dict[int, NgramIndex] = {}

    @property
    def is_free(self) -> bool:
        return True

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

    @property
    def is_free(self) -> bool:
        return False

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


class Speculator:
    """Drafts for the requests of the next step, as many as the policy finds worth their time."""

    def __init__(self, proposer: Proposer, policy: DraftPolicy) -> None:
        self._proposer = proposer
        self._policy = policy
        self._asked = 0, 0  # requests that were drafted for last, and tokens drawn for each
        self._num_resting = 0  # steps that are still to pass before drafts are looked for
        self._rest = 0
        self._num_missed = 0  # looks in a row that found nothing

    @property
    def is_resting(self) -> bool:
        """Whether the next step has no drafts, whatever its requests."""
        return self._num_resting > 0

    def propose(self, requests: Sequence[RunningRequest]) -> dict[RunningRequest, tuple[int, ...]]:
        """Drafts behind the tokens of some of `requests`, each of which has one token to compute."""
        proposer, policy = self._proposer, self._policy
        self._asked = 0, 0
        if self._num_resting:
            self._num_resting -= 1
            policy.skip()
            return {}
        if not requests:
            return {}
        if not policy.can_pay(len(requests), proposer.is_free):
            self._num_resting = QUESTION_REST
            return {}
        if proposer.is_free:
            return self._propose_free(requests)
        shortest = requests[0] if policy.steps_to_trial else min(requests, key=_num_tokens)
        count = policy.choose(len(requests), shortest=_num_tokens(shortest))
        if not count:
            self._num_resting = min(QUESTION_REST, policy.steps_to_trial) if policy.is_off else 0
            return {}
        if policy.is_probe:
            requests = [min(requests, key=_num_tokens)]
        self._asked = len(requests), count
        return _usable(proposer.propose(requests, count))

    def _propose_free(self, requests: Sequence[RunningRequest]) -> dict[RunningRequest, tuple[int, ...]]:
        """Drafts that are worth nothing, or are not there, are looked for more and more rarely: looking takes
        time, too."""
        policy = self._policy
        drafts = _usable(self._proposer.propose(requests, policy.most))
        count = policy.choose(len(requests), tuple(map(len, drafts.values())))
        self._num_missed = 0 if drafts else self._num_missed + 1
        if drafts and not count:
            self._num_resting = self._rest = min(2 * self._rest + 1, MOST_REST)
        else:
            self._rest = 0
            self._num_resting = min(self._num_missed // MISSES, MOST_MISS_REST)
        if count == policy.most:
            return drafts
        return {request: draft_ids[:count] for request, draft_ids in drafts.items()} if count else {}

    def observe(self, num_drafted: int, num_accepted: int, times: int) -> None:
        """Of `num_drafted` drafts the first `num_accepted` were accepted, in `times` requests."""
        self._policy.acceptance.observe(num_drafted, num_accepted, times)

    def observe_step(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A step of `chunks`, drafting included, took `seconds`. Prompts say nothing of what drafts cost."""
        num_tokens = 0
        for _, _, num_new, draft_ids, samples in chunks:
            if num_new != 1 or not samples:
                return
            num_tokens += 1 + len(draft_ids)
        self._policy.observe_step(len(chunks), num_tokens, *self._asked, seconds)

    def forget(self, request_id: int) -> None:
        """The request ended or lost its row."""
        self._proposer.forget(request_id)


def make_speculator(
    config: RuntimeConfig, executor: Executor, costs: SpeculationCosts | None
) -> Speculator | None:
    """What `config.speculation` asks for. UsageError for a draft model that the executor does not have."""
    if config.speculation == "none":
        return None
    policy = DraftPolicy(config.draft_tokens, costs)
    if config.speculation == "ngram":
        return Speculator(NgramProposer(config.ngram_min, config.ngram_max), policy)
    if not executor.caps.can_propose:
        raise UsageError(
            "runtime.no_draft_model",
            f"The executor {executor.caps.name} has no draft model.",
            "Speculation was set to draft, which needs one.",
            "Load a draft artifact, or choose ngram or none.",
        )
    return Speculator(DraftProposer(executor), policy)


def _num_tokens(request: RunningRequest) -> int:
    return len(request.token_ids)


def _usable(drafts: dict[RunningRequest, tuple[int, ...]]) -> dict[RunningRequest, tuple[int, ...]]:
    """Drafts within each request's token limit, up to the first that its grammar does not allow."""
    usable: dict[RunningRequest, tuple[int, ...]] = {}
    for request, draft_ids in drafts.items():
        spec = request.request
        left = spec.max_tokens - len(request.token_ids) + len(spec.prompt_token_ids) - 1
        kept = draft_ids if len(draft_ids) <= left else draft_ids[:left]
        if request.grammar is not None:
            kept = kept[: request.grammar.count_allowed(kept)]
        if kept:
            usable[request] = kept
    return usable
