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
# Looking takes time where nothing is found, too: with a small model a tenth of a step, whatever the machine,
# mostly to fetch what was driven out of its caches. After so many looks in vain one more step passes between
# two, then three, seven and so on, as long as looking takes more than this share of the steps.
LOOK_S, LOOK_EACH_S = 30e-6, 8e-6
LOOK_SHARE = 0.01
MISSES = 4
# A token id has fewer bits.
_TOKEN_BITS = 32
# Of an n-gram that occurs over and over so many places are compared, the last ones.
_MOST_PLACES = 64


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
    """Where the n-grams of a growing token list occurred, for n from `min_n` to `max_n`. Tokens are only ever
    appended between calls."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n = min_n
        self._max_n = max_n
        # Where the last place of each n-gram of `min_n` tokens ends, and of each place the one before it. A
        # key is one number: of tuples, which are kept, Python's collector of cycles would look at all.
        self._last: dict[int, int] = {}
        self._before: list[int] = [-1] * min_n
        self._found = -1

    def propose(self, token_ids: Sequence[int], k: int) -> tuple[int, ...]:
        """The `k` tokens that followed the latest earlier occurrence of the longest matching suffix
        (prompt lookup, Saxena 2023), among the last `_MOST_PLACES`; a match that reaches the end continues
        into its own copy."""
        length = len(token_ids)
        if length >= len(self._before):
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
        """Indexes every place up to the end, and finds the best one for what follows there."""
        last, before, size = self._last, self._before, self._min_n
        for end in range(len(before), length + 1):
            key = 0
            for token_id in token_ids[end - size : end]:
                key = key << _TOKEN_BITS | token_id
            before.append(last.get(key, -1))
            last[key] = end
        self._found = self._longest(token_ids, length)

    def _longest(self, token_ids: Sequence[int], length: int) -> int:
        """Where the longest n-gram ends that the tokens end with, too, the latest of equal ones; or -1."""
        best, best_size, place = -1, 0, self._before[length]
        for _ in range(_MOST_PLACES):
            if place < 0 or best_size == self._max_n:
                break
            size, most = self._min_n, min(self._max_n, place)
            while size < most and token_ids[place - 1 - size] == token_ids[length - 1 - size]:
                size += 1
            if size > best_size:
                best, best_size = place, size
            place = self._before[place]
        return best


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
        if len(requests) == 1:
            return {requests[0]: drafts.token_ids[0]} if drafts.token_ids[0] else {}
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
        is_first = policy.steps_to_trial or len(requests) == 1
        shortest = requests[0] if is_first else min(requests, key=_num_tokens)
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
        if count:
            self._num_missed = self._rest = 0
        elif drafts:
            self._num_resting = self._rest = min(2 * self._rest + 1, MOST_REST)
        else:
            self._num_missed += 1
            looks_s = LOOK_S + LOOK_EACH_S * len(requests)
            most = min(MOST_REST, policy.steps_of(looks_s / LOOK_SHARE, len(requests)) - 1)
            self._num_resting = max(0, min(2 ** (self._num_missed // MISSES) - 1, most))
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
