"""Does an executor compute what the model computed when it was compiled, whichever way it runs a step? Faster
ways than the obvious one are held to it when an artifact is loaded. Knows no device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..artifact.oracle import Oracle
from ..spec.errors import DeviceLostError, TargetError
from .config import RuntimeConfig
from .engine import Engine
from .oracle import check_oracle
from .protocol import Executor, SamplingState, TokenLogprob
from .request import FinishReason, Request

# Of the oracle's prompts, how many are continued, from how many of their tokens, by how many: few enough that
# a recorded step holds them all, and that loading takes no longer.
_PROMPTS, _PROMPT_TOKENS, _TOKENS = 4, 12, 8
_SAMPLINGS = (SamplingState(logprobs=1), SamplingState(temperature=1.0, seed=11))


@runtime_checkable
class Provable(Protocol):
    """An executor with several ways to run a step that must give the same tokens."""

    @property
    def ways(self) -> Mapping[str, bool]:
        """Those beside the obvious one, and whether the settings demand them."""
        ...

    def run_by(self, ways: Collection[str]) -> None:
        """Run steps by `ways` from now on, and the obvious one where they do not apply. Steps under way are
        waited for, and rows are empty."""
        ...

    def give_up(self, way: str, reason: str) -> None:
        """Go without a way, and say so where users read it."""
        ...


def check_executor(executor: Executor, oracle: Oracle) -> None:
    """Raises ArtifactError where the executor's model differs from `oracle`, and TargetError where a way of
    running steps that the settings demand gives other tokens than the obvious one; others are given up."""
    if not isinstance(executor, Provable):
        check_oracle(executor, oracle)
        return
    ways = executor.ways
    executor.run_by(())
    check_oracle(executor, oracle)
    prompts = [prompt.token_ids[:_PROMPT_TOKENS] for prompt in oracle.prompts[:_PROMPTS]]
    expected = continued(executor, prompts) if ways else []
    kept: list[str] = []
    for way, is_demanded in ways.items():
        executor.run_by((way,))
        problem = _problem(executor, way, prompts, expected)
        if not problem:
            kept.append(way)
        elif is_demanded:
            raise TargetError(
                "runtime.way_fails",
                f"Steps cannot be run by {way} on this machine, which the settings demand.",
                problem,
                "Set it to auto or off, and report this with the model and the device.",
            )
        else:
            executor.run_by(())
            executor.give_up(way, problem)
    executor.run_by(kept)


@dataclass(slots=True)
class Continued:
    """What came behind a prompt; `error` where the step failed."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    error: str = ""


def _problem(
    executor: Executor, way: str, prompts: Sequence[Sequence[int]], expected: Sequence[Continued]
) -> str:
    """What is wrong with the way that the executor runs steps; empty where nothing is."""
    try:
        found = continued(executor, prompts)
    except DeviceLostError as lost:
        why = f"It happened where {way} were held to the tokens of launching kernel by kernel. {lost.why}"
        raise DeviceLostError(lost.code, lost.what, why, lost.fix) from lost
    for number, (own, other) in enumerate(zip(found, expected, strict=True)):
        if own.error:
            return f"A step failed: {own.error}"
        if own != other:
            what = f"the tokens {own.token_ids} instead of {other.token_ids}"
            what = "other logprobs" if own.token_ids == other.token_ids else what
            return f"Prompt {number} of the oracle gives {what} of launching kernel by kernel."
    return ""


def continued(executor: Executor, prompts: Sequence[Sequence[int]]) -> list[Continued]:
    """What comes behind each of `prompts`, all at once, as far as the executor's limits go."""
    caps = executor.caps
    rows = min(len(prompts), caps.max_rows, caps.max_tokens)
    config = RuntimeConfig(max_requests=rows, max_step_tokens=caps.max_tokens, prefix_cache=False)
    engine = Engine(executor, config)
    most = engine.limits.max_model_len
    for number, prompt in enumerate(prompts):
        own = tuple(prompt[: max(1, most - _TOKENS)])
        engine.add_request(
            Request(
                request_id=number,
                prompt_token_ids=own,
                max_tokens=min(_TOKENS, most - len(own)),
                sampling=_SAMPLINGS[number % len(_SAMPLINGS)],
            )
        )
    found = [Continued() for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            own = found[output.request_id]
            own.token_ids += output.token_ids
            own.logprobs += output.logprobs
            if output.finished is not None and output.finished.reason is FinishReason.ERROR:
                own.error = output.finished.error or "it said nothing"
    return found
