"""What a request may ask, and what may happen to it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llmc.runtime.blocks import SequenceBlocks
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.params import SamplingParams
from llmc.runtime.prefix import Node
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import (
    TRANSITIONS,
    Event,
    FinishReason,
    Request,
    RunningRequest,
    State,
    WaitingRequest,
    admit,
    finish,
    next_state,
    preempt,
    state_of,
)
from llmc.spec.errors import InternalError, LlmcError, RequestError, UsageError

pytestmark = pytest.mark.pure


def waiting():
    request = Request(request_id=1, prompt_token_ids=(5, 6), max_tokens=4, sampling=SamplingState())
    return WaitingRequest(request=request, token_ids=[5, 6, 7], num_uncached=3)


def running():
    return admit(waiting(), 0, SequenceBlocks([[0]], Node(), 0), 0)


def finished():
    return finish(running(), FinishReason.STOP)


MADE = {State.WAITING: waiting, State.RUNNING: running, State.FINISHED: finished}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_pair_of_state_and_event(state, event):
    """The functions do exactly what the table says, and refuse what it does not list."""
    entry = MADE[state]()
    assert state_of(entry) is state

    def happen():
        if event is Event.ADMIT:
            return admit(entry, 0, SequenceBlocks([[0]], Node(), 0), 0)
        if event is Event.PREEMPT:
            return preempt(entry)
        return finish(entry, FinishReason(event.value))

    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(InternalError, match=f"A {state.value} request met the event {event.value}"):
            next_state(state, event)
    else:
        assert next_state(state, event) is after
        assert state_of(happen()) is after
    if state is State.FINISHED:
        assert after is None


def test_endings_are_the_reasons():
    assert {event.value for event in Event} - {"admit", "preempt"} == {
        reason.value for reason in FinishReason
    }


def test_preemption_keeps_tokens_and_counts():
    again = preempt(running())
    assert again.token_ids == [5, 6, 7]
    assert again.num_preemptions == 1
    assert isinstance(admit(again, 0, SequenceBlocks([[0]], Node(), 0), 2), RunningRequest)
    assert finish(again, FinishReason.ABORT).output_token_ids == (7,)


WRONG = [
    ("max_tokens", 0, "an integer of at least 1"),
    ("max_tokens", 1.5, "an integer of at least 1"),
    ("max_tokens", True, "an integer"),
    ("temperature", -0.1, "a number from 0 to 100"),
    ("temperature", math.nan, "a number from 0 to 100"),
    ("temperature", 1e-9, r"0 \(greedy\), or 1e-06 to 100"),
    ("temperature", "hot", "a number from 0 to 100"),
    ("top_p", 0.0, "a number above 0 up to 1"),
    ("top_p", 1.01, "a number above 0 up to 1"),
    ("top_k", -1, "an integer of at least 0"),
    ("min_p", 1.5, "a number from 0 to 1"),
    ("repetition_penalty", 0.0, "a number above 0"),
    ("presence_penalty", 2.5, "a number from -2 to 2"),
    ("frequency_penalty", -math.inf, "a number from -2 to 2"),
    ("seed", -1, "an integer from 0 to 18446744073709551615"),
    ("seed", 2**64, "an integer from 0 to"),
    ("n", 0, "an integer from 1 to 128"),
    ("logprobs", 101, "an integer from 0 to 100"),
    ("min_tokens", -1, "an integer of at least 0"),
    ("stop", ("",), "strings of at least one character"),
    ("stop", (5,), "strings of at least one character"),
    ("stop", ("x",) * 65, "at most 64 strings"),
    ("stop_token_ids", (-1,), "an integer of at least 0"),
    ("logit_bias", {3: 101.0}, "a number from -100 to 100"),
    ("logit_bias", {-3: 1.0}, "an integer of at least 0"),
    ("logit_bias", {"3": 1.0}, "an integer of at least 0"),
    ("ignore_eos", 1, "true or false"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=lambda value: str(value)[:16])
def test_parameters_out_of_range_are_named(name, value, allowed):
    with pytest.raises(RequestError, match=allowed) as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.what
    assert caught.value.code == f"request.{name}"
    assert caught.value.http_status == 400


def test_min_tokens_beyond_max_tokens():
    with pytest.raises(RequestError, match=r"min_tokens is 9\. Allowed is 0 to max_tokens = 4"):
        SamplingParams(min_tokens=9, max_tokens=4)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)


def test_sampling_state_carries_everything():
    params = SamplingParams(
        temperature=1,
        top_k=3,
        min_tokens=2,
        stop_token_ids=(4,),
        logit_bias={7: 2, 3: -1},
        seed=9,
        logprobs=0,
    )
    state = params.sampling_state(1, 10, (8,))
    assert state == SamplingState(
        temperature=1.0,
        top_k=3,
        min_tokens=2,
        banned_until_min=(8, 4),
        logit_bias=((3, -1.0), (7, 2.0)),
        seed=9,
        logprobs=0,
    )
    assert SamplingParams(ignore_eos=True, stop_token_ids=(4,)).stop_ids((8,)) == (4,)
    seeds = [params.sampling_state(1, 10, (), number).seed for number in range(4)]
    assert seeds[0] == 9
    assert len(set(seeds)) == 4
    assert SamplingParams().sampling_state(77, 10, ()).seed == 77


def test_every_parameter_has_a_field_of_the_same_name():
    """A parameter that is validated and then forgotten would be ignored in silence."""
    elsewhere = {
        "max_tokens",
        "stop",
        "stop_token_ids",
        "n",
        "prompt_logprobs",
        "ignore_eos",
        "skip_special_tokens",
        "structured",
    }
    known = {field.name for field in dataclasses.fields(SamplingState)} | elsewhere
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= known


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_bytes", -1),
        ("max_requests", 0),
        ("max_waiting", -1),
        ("max_step_tokens", 63),
        ("max_model_len", 0),
        ("order", "lifo"),
        ("speculation", "maybe"),
        ("draft_tokens", 0),
        ("ngram_max", 1),
        ("timeout_s", 0.0),
        ("max_wait_s", -1.0),
        ("prompt_weight", 0.0),
        ("output_weight", float("inf")),
        ("long_prompt_tokens", -1),
        ("long_share", 1.0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    RuntimeConfig().validate()
    with pytest.raises(UsageError, match=f"The runtime setting {name} is {value!r}"):
        RuntimeConfig(**{name: value}).validate()


def test_errors_have_three_parts():
    with pytest.raises(LlmcError) as caught:
        SamplingParams(n=0)
    assert all(part.endswith(".") and part.count(". ") == 0 for part in (caught.value.what, caught.value.fix))
