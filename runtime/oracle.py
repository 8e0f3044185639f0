"""Does an executor compute what the model computed when it was compiled? Measures prompts through any
executor, and compares with the stored oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..artifact.checksums import Problem
from ..artifact.oracle import Oracle, OraclePrompt
from ..artifact.schema import ORACLE
from ..spec.errors import ArtifactError, InternalError
from .config import RuntimeConfig
from .engine import Engine
from .protocol import Executor, RowDiff, SamplingState, TokenLogprob
from .request import FinishReason, Request


def measure_prompts(executor: Executor, prompts: Sequence[Sequence[int]]) -> tuple[OraclePrompt, ...]:
    """What the executor's model says about every token of `prompts`, under teacher forcing.

    Prompts longer than the executor's cache or context are measured as far as they fit: what a causal
    model says about a beginning does not depend on the rest. Raises InternalError when the
    model fails on one.
    """
    caps = executor.caps
    config = RuntimeConfig(
        max_requests=min(len(prompts), caps.max_rows, caps.max_tokens),
        max_step_tokens=caps.max_tokens,
        prefix_cache=False,
    )
    engine = Engine(executor, config)
    fitting = [tuple(prompt[: engine.limits.max_model_len - 1]) for prompt in prompts]
    for number, prompt in enumerate(fitting):
        engine.add_request(
            Request(
                request_id=number,
                prompt_token_ids=prompt,
                max_tokens=1,
                sampling=SamplingState(logprobs=2),
                prompt_logprobs=True,
            )
        )
    measured = _drain(engine, len(prompts))
    executor.apply(RowDiff(leave=tuple(range(config.max_requests))))
    return tuple(_as_prompt(prompt, found) for prompt, found in zip(fitting, measured, strict=True))


def _drain(engine: Engine, count: int) -> list[list[TokenLogprob]]:
    measured: list[list[TokenLogprob]] = [[] for _ in range(count)]
    while engine.has_work():
        for output in engine.step():
            measured[output.request_id].extend(output.prompt_logprobs)
            if output.finished is not None and output.finished.reason is FinishReason.ERROR:
                raise InternalError(
                    "runtime.oracle_failed",
                    "The model cannot compute the prompts of its oracle.",
                    f"{output.finished.error or 'The step failed.'}",
                    "Compile the model again; if that does not help, report this with its config.json.",
                )
    return measured


def _as_prompt(token_ids: tuple[int, ...], measured: list[TokenLogprob]) -> OraclePrompt:
    tops = [entry.top for entry in measured]
    return OraclePrompt(
        token_ids=token_ids,
        logprobs=tuple(entry.logprob for entry in measured),
        best_ids=tuple(top[0][0] for top in tops),
        margins=tuple(top[0][1] - top[1][1] if len(top) > 1 else math.inf for top in tops),
    )


def oracle_problems(executor: Executor, oracle: Oracle) -> list[Problem]:
    """Where the executor's model differs from what `oracle` stored; empty when the oracle holds."""
    return differences(oracle, measure_prompts(executor, [prompt.token_ids for prompt in oracle.prompts]))


def differences(oracle: Oracle, measured: Sequence[OraclePrompt]) -> list[Problem]:
    """Where what was measured on the prompts of `oracle`, as far as they fit, differs from what it stored."""
    problems: list[Problem] = []
    for number, (stored, found) in enumerate(zip(oracle.prompts, measured, strict=True)):
        count = len(found.logprobs)
        kept = replace(
            stored,
            logprobs=stored.logprobs[:count],
            best_ids=stored.best_ids[:count],
            margins=stored.margins[:count],
        )
        problems += _compare(number, kept, found, oracle.tolerance)
    return problems


def _compare(number: int, stored: OraclePrompt, found: OraclePrompt, tolerance: float) -> list[Problem]:
    problems: list[Problem] = []
    rows = zip(stored.logprobs, found.logprobs, stored.best_ids, found.best_ids, stored.margins, strict=True)
    for position, (expected, logprob, best_id, found_id, margin) in enumerate(rows):
        where = f"does not hold at token {position + 1} of prompt {number}"
        if not abs(logprob - expected) <= tolerance:
            what = (
                f"{where}: its logprob is {logprob:.6g} instead of {expected:.6g} (tolerance {tolerance:g})"
            )
            problems.append(Problem(file=ORACLE, what=what))
        elif margin > 2 * tolerance and found_id != best_id:
            what = f"{where}: token {found_id} is the best instead of {best_id}, whose margin was {margin:g}"
            problems.append(Problem(file=ORACLE, what=what))
    return problems


def check_oracle(executor: Executor, oracle: Oracle) -> None:
    """Raises ArtifactError naming the first token where the executor's model differs from `oracle`."""
    problems = oracle_problems(executor, oracle)
    if problems:
        rest = f" ({len(problems) - 1} more tokens differ)" if len(problems) > 1 else ""
        raise ArtifactError(
            "artifact.oracle_fails",
            "The model does not compute on this machine what it computed when it was compiled.",
            f"{problems[0]}{rest}.",
            "Run `llmc doctor`, and compile the model again on this machine.",
        )
