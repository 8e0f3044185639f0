"""Ways to run a step are held to the obvious one when an artifact is loaded: what gives other tokens, or
fails, is given up, or is an error where the settings demand it."""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec
import pytest

from llmc.artifact.oracle import Oracle
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.oracle import measure_prompts
from llmc.runtime.proof import Provable, check_executor
from llmc.runtime.protocol import RowDiff
from llmc.spec.errors import ArtifactError, DeviceLostError, InternalError, TargetError

pytestmark = pytest.mark.pure
PROMPTS = ((1, 2, 3, 4, 5), (6, 7), (9, 9, 1))


def simulated():
    return SimulatedExecutor(simulated_caps())


ORACLE = Oracle(prompts=measure_prompts(simulated(), PROMPTS), tolerance=1e-6)


class Several:
    """An executor whose `ways` do to each result what they say: `right` ones nothing."""

    def __init__(self, ways, plainly=lambda result: result, demanded=()):
        self._inner, self._ways, self._plainly = simulated(), dict(ways), plainly
        self._demanded = demanded
        self.used, self.given_up, self.steps = (), {}, []

    @property
    def caps(self):
        return self._inner.caps

    @property
    def ways(self):
        return {name: name in self._demanded for name in self._ways}

    def run_by(self, ways):
        self.used = tuple(ways)
        self._inner.apply(RowDiff(leave=tuple(range(self.caps.max_rows))))

    def give_up(self, way, reason):
        self.given_up[way] = reason
        del self._ways[way]

    def apply(self, diff):
        self._inner.apply(diff)

    def submit(self, plan):
        self.steps.append(self.used)
        return self._inner.submit(plan)

    def collect(self, ticket):
        result = self._inner.collect(ticket)
        for change in [self._ways[way] for way in self.used] or [self._plainly]:
            result = change(result)
        return result

    def propose(self, rows, k):
        return self._inner.propose(rows, k)

    def close(self):
        self._inner.close()


def right(result):
    return result


def other_tokens(result):
    """In the last step: the simulated executor refuses to go on from tokens that are not its own."""
    if result.step_id < 8:
        return result
    rows = [
        msgspec.structs.replace(row, token_ids=tuple(each ^ 1 for each in row.token_ids))
        for row in result.rows
    ]
    return msgspec.structs.replace(result, rows=tuple(rows))


def other_logprobs(result):
    rows = [
        msgspec.structs.replace(
            row, logprobs=tuple(replace(each, logprob=each.logprob - 1e-6) for each in row.logprobs)
        )
        for row in result.rows
    ]
    return msgspec.structs.replace(result, rows=tuple(rows))


def worse(result):
    rows = [
        msgspec.structs.replace(
            row,
            prompt_logprobs=tuple(replace(each, logprob=each.logprob - 1) for each in row.prompt_logprobs),
        )
        for row in result.rows
    ]
    return msgspec.structs.replace(result, rows=tuple(rows))


def fails(result):
    raise InternalError(
        "cuda.arena", "A step needs memory that was not planned.", "It has none.", "Report it."
    )


def test_ways_that_give_the_same_tokens_are_all_used_afterwards():
    executor = Several({"graphs": right, "lists": right})
    assert isinstance(executor, Provable)
    check_executor(executor, ORACLE)
    assert executor.used == ("graphs", "lists")
    assert not executor.given_up
    # The oracle is the obvious way's, and each other way was tried by itself.
    assert {(), ("graphs",), ("lists",)} == set(executor.steps)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (other_tokens, r"Prompt 0 of the oracle gives the tokens \[.*\] instead of \["),
        (other_logprobs, "Prompt 0 of the oracle gives other logprobs of"),
        (fails, "A step failed: A step needs memory that was not planned. It has none."),
    ],
)
def test_a_way_that_gives_something_else_is_given_up_and_the_others_stay(wrong, reason):
    executor = Several({"graphs": wrong, "lists": right})
    check_executor(executor, ORACLE)
    assert executor.used == ("lists",)
    assert list(executor.given_up) == ["graphs"]
    assert re.search(reason, executor.given_up["graphs"])


def test_a_way_that_is_demanded_is_not_given_up():
    executor = Several({"graphs": other_tokens}, demanded=("graphs",))
    with pytest.raises(TargetError, match=r"cannot be run by graphs .* Set it to auto or off"):
        check_executor(executor, ORACLE)
    assert not executor.given_up


def test_a_model_that_computes_something_else_is_damage_and_no_fault_of_a_way():
    executor = Several({"graphs": right}, plainly=worse)
    with pytest.raises(ArtifactError, match="does not compute on this machine"):
        check_executor(executor, ORACLE)


def test_a_device_that_is_lost_says_by_which_way():
    def lose(result):
        raise DeviceLostError("cuda.device_lost", "The GPU failed in a step.", "Code 700.", "Check it.")

    executor = Several({"graphs": lose})
    with pytest.raises(DeviceLostError, match=r"graphs were held to .* Code 700"):
        check_executor(executor, ORACLE)
