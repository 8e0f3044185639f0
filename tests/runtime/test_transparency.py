"""The transparency matrix over a simulated model: whatever else runs, however it is chunked, preempted,
cached or drafted, a request's tokens are those it gets alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.protocol import SamplingState

pytestmark = pytest.mark.pure

LAYOUTS = {
    "full": ("full", 0, 4),
    "window": ("window", 6, 4),
    "chunk": ("chunk", 8, 4),
    "small pages": ("full", 0, 2),
}
SAMPLINGS = [
    SamplingState(),
    SamplingState(temperature=0.8, seed=7),
    SamplingState(temperature=1.3, seed=2**63 + 5, top_k=9, top_p=0.9, min_p=0.02),
    SamplingState(
        temperature=0.7, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
    ),
    SamplingState(temperature=1.0, seed=11, min_tokens=6, banned_until_min=(1, 2), logprobs=2),
]


def caps_for(names, num_blocks, **fields):
    groups = [(*LAYOUTS[name], num_blocks * 4 // LAYOUTS[name][2]) for name in names]
    return simulated_caps(groups=groups, max_context=64, **fields)


def prompts_for(rng, count):
    stems = [[rng.randrange(29) for _ in range(rng.choice([5, 8, 17]))] for _ in range(2)]
    return [
        [*rng.choice([[], *stems]), *(rng.randrange(29) for _ in range(rng.randrange(1, 14)))]
        for _ in range(count)
    ]


def alone(names, request, drained):
    engine = Engine(SimulatedExecutor(caps_for(names, 64, max_tokens=64)), RuntimeConfig(prefix_cache=False))
    engine.add_request(request)
    return drained(engine)[request.request_id].output_token_ids


@pytest.mark.parametrize(
    "names", [["full"], ["full", "window"], ["chunk", "small pages"], ["window"]], ids=str
)
@pytest.mark.parametrize("speculation", ["none", "ngram", "draft"])
@pytest.mark.parametrize("prefix_cache", [True, False])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([16, 20, 40, 200]),
    max_step_tokens=st.sampled_from([3, 7, 64]),
    max_in_flight=st.sampled_from([1, 2, 3]),
    order=st.sampled_from(["hrrn", "fcfs", "priority"]),
)
def test_tokens_do_not_depend_on_company(
    names,
    speculation,
    prefix_cache,
    request_of,
    drained,
    seed,
    num_blocks,
    max_step_tokens,
    max_in_flight,
    order,
):
    rng = random.Random(seed)
    executor = SimulatedExecutor(
        caps_for(names, num_blocks, max_rows=3, max_tokens=64, max_in_flight=max_in_flight, can_propose=True)
    )
    config = RuntimeConfig(
        max_requests=3,
        max_step_tokens=max_step_tokens,
        speculation=speculation,
        prefix_cache=prefix_cache,
        order=order,
        ngram_min=1,
    )
    engine = Engine(executor, config)
    requests = [
        request_of(
            number,
            prompt,
            rng.randrange(1, 24),
            rng.choice(SAMPLINGS),
            stop_token_ids=frozenset(rng.sample(range(29), rng.choice([0, 1]))),
            priority=rng.randrange(3),
        )
        for number, prompt in enumerate(prompts_for(rng, 7))
    ]
    for request in requests[:4]:
        engine.add_request(request)
    early = [output for _ in range(rng.randrange(6)) if engine.has_work() for output in engine.step()]
    for request in requests[4:]:
        engine.add_request(request)
    told = {output.request_id: output.finished for output in early if output.finished} | drained(engine)
    for request in requests:
        assert told[request.request_id].output_token_ids == alone(names, request, drained)


def test_preemption_drafts_and_hits_really_happen(request_of, drained):
    """The matrix means nothing if its cells are empty."""
    rng = random.Random(1)
    caps = caps_for(["full", "window"], 17, max_rows=6, can_propose=True)
    engine = Engine(
        SimulatedExecutor(caps), RuntimeConfig(max_requests=6, speculation="draft", max_step_tokens=16)
    )
    for number in range(12):
        engine.add_request(request_of(number, [1, 2, 3, 4, 5, 6, 7, 8, 9, rng.randrange(29)], 20))
    drained(engine)
    assert engine.stats.num_preemptions > 3
    assert 0 < sum(engine.stats.accepted_at) < sum(engine.stats.drafted_at)
    assert engine.blocks.stats.hit_tokens > 8
    assert engine.stats.drafted_at == sorted(engine.stats.drafted_at, reverse=True)


def test_cold_warm_and_evicted_cache_give_the_same_tokens(request_of, drained):
    caps = caps_for(["full", "window"], 20)
    engine = Engine(SimulatedExecutor(caps), RuntimeConfig(max_step_tokens=64))
    request = request_of(0, range(21), 10, SAMPLINGS[1])
    runs = []
    for round_ in range(3):
        if round_ == 2:
            engine.add_request(request_of(1, [*range(28, 0, -1), *range(20)], 16))
            drained(engine)
        engine.add_request(request)
        runs.append(drained(engine)[0])
    assert [run.num_cached_tokens for run in runs] == [0, 20, 0]
    assert len({run.output_token_ids for run in runs}) == 1


def test_drafts_save_steps(request_of, drained):
    steps = {}
    for speculation in ("none", "draft", "ngram"):
        executor = SimulatedExecutor(caps_for(["full"], 64, can_propose=True))
        engine = Engine(executor, RuntimeConfig(speculation=speculation, ngram_min=1))
        engine.add_request(request_of(0, [1, 8, 14, 15, 1, 8], 50))
        drained(engine)
        steps[speculation] = engine.stats.num_steps
    assert steps["none"] == 50
    assert steps["draft"] < 40
    assert steps["ngram"] < 50


def test_an_engine_that_is_told_not_to_speculate_decodes_plainly_until_it_is_told_again(request_of, drained):
    engine = Engine(
        SimulatedExecutor(caps_for(["full"], 64, can_propose=True)), RuntimeConfig(speculation="draft")
    )
    steps, answers = [], set()
    for number, engine.speculates in enumerate((False, True, False)):
        before = engine.stats.num_steps
        engine.add_request(request_of(number, [1, 8, 14, 15, 1, 8], 50))
        answers.add(drained(engine)[number].output_token_ids)
        steps.append(engine.stats.num_steps - before)
    assert steps[0] == steps[2] == 50
    assert steps[1] < 40
    assert len(answers) == 1


@pytest.mark.parametrize("length", range(9, 14))
@pytest.mark.parametrize("names", [["full"], ["full", "window"], ["chunk"]], ids=str)
def test_the_next_turn_hits_only_what_was_computed(names, length, request_of, drained):
    """The last token of an answer is sampled and never computed: a page that ends with it is not whole."""
    engine = Engine(SimulatedExecutor(caps_for(names, 64)), RuntimeConfig())
    first = request_of(0, range(7), length - 7)
    engine.add_request(first)
    answer = drained(engine)[0].output_token_ids
    second = request_of(1, [*range(7), *answer, 3, 1], 8)
    engine.add_request(second)
    finished = drained(engine)[1]
    assert finished.num_cached_tokens == (length - 1) // 4 * 4
    assert finished.output_token_ids == alone(names, second, drained)


def logprobs_told(engine):
    """All logprobs of each request, of its output and of its prompt, in the order they came."""
    output, prompt = {}, {}
    while engine.has_work():
        for each in engine.step():
            output.setdefault(each.request_id, []).extend(each.logprobs)
            prompt.setdefault(each.request_id, []).extend(each.prompt_logprobs)
    return output, prompt


def test_logprobs_do_not_depend_on_chunks_preemption_or_drafts(request_of):
    sampling = SamplingState(temperature=0.9, seed=4, logprobs=2)
    requests = [
        request_of(number, range(number, number + 14), 14, sampling, prompt_logprobs=number % 2 == 0)
        for number in range(5)
    ]
    config = RuntimeConfig(max_requests=5, max_step_tokens=20, speculation="draft", draft_tokens=3)
    caps = caps_for(["full", "window"], 11, max_rows=5, can_propose=True)
    engine = Engine(SimulatedExecutor(caps), config)
    for request in requests:
        engine.add_request(request)
    output, prompt = logprobs_told(engine)
    assert engine.stats.num_preemptions > 0
    assert sum(engine.stats.accepted_at) > 0
    for request in requests:
        alone_engine = Engine(SimulatedExecutor(caps_for(["full", "window"], 64)))
        alone_engine.add_request(request)
        alone_output, alone_prompt = logprobs_told(alone_engine)
        number = request.request_id
        assert output[number] == alone_output[number]
        assert prompt[number] == alone_prompt[number]
        assert len(output[number]) == 14
        assert len(prompt[number]) == (13 if number % 2 == 0 else 0)
