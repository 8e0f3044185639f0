"""A draft model beside its target, on the reference executor: its caches never change a token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_loading import attach_draft, draft_config, with_draft
from llmc.runtime.engine import Engine
from llmc.runtime.executors.drafting import Drafter
from llmc.runtime.executors.reference import make_executor, source_of_program
from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps
from llmc.runtime.protocol import RowDiff, RowEntry, SamplingState
from llmc.runtime.sampling import History, sample_segment, sample_token
from llmc.runtime.speculation_costs import measure_costs
from llmc.spec.errors import TargetError, UsageError

SAMPLINGS = [
    SamplingState(),
    SamplingState(temperature=0.9, seed=7, logprobs=2),
    SamplingState(temperature=1.3, seed=2**63 + 5, top_k=19, top_p=0.9, repetition_penalty=1.2),
]
DRAFTS = {
    "itself": {},
    "smaller": {"hidden": 16, "ffn": 24},
    "windows": {"windows": (0, 12), "page_tokens": 4},
}


@pytest.fixture(scope="module")
def target(build_program):
    return source_of_program(build_program())


@pytest.fixture(scope="module")
def drafts(build_program):
    return {name: source_of_program(build_program(**fields)) for name, fields in DRAFTS.items()}


def joined(target, draft, config):
    """An executor over both models."""
    executor = make_executor(target, config)
    attach_draft(executor, make_executor(draft, draft_config(config, executor)))
    return executor


def tokens_of(executor, config, requests, drained, stagger=None):
    engine = Engine(executor, config)
    ended = {}
    for request in requests:
        engine.add_request(request)
        for _ in range(stagger.randrange(3) if stagger else 0):
            ended |= {each.request_id: each.finished for each in engine.step() if each.finished}
    ended |= drained(engine)
    return {number: finished.output_token_ids for number, finished in ended.items()}, engine.stats


def requests_for(request_of, vocab, count=5):
    rng = random.Random(3)
    stem = [rng.randrange(vocab) for _ in range(20)]
    return [
        request_of(
            number,
            [*stem[: rng.choice([0, 7, 20])], *(rng.randrange(vocab) for _ in range(rng.randrange(1, 12)))],
            rng.randrange(12, 26),
            SAMPLINGS[number % len(SAMPLINGS)],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_model_changes_no_token(name, target, drafts, request_of, drained):
    requests = requests_for(request_of, target.spec.vocab_size)
    plain = RuntimeConfig(num_threads=1, max_requests=6, max_step_tokens=64)
    alone = {}
    for request in requests:
        alone |= tokens_of(make_executor(target, plain), plain, [request], drained)[0]
    cells = {
        "together": {},
        "chunked": {"max_step_tokens": 9, "draft_tokens": 2},
        "preempted": {"cache_bytes": target.cache.bytes_per_token * 8 * 9, "max_model_len": 60},
    }
    for cell, fields in cells.items():
        config = RuntimeConfig(
            **{"num_threads": 1, "max_requests": 6, "max_step_tokens": 64, "speculation": "draft", **fields}
        )
        executor = joined(target, drafts[name], config)
        for _ in range(2 if cell == "together" else 1):  # the second time both caches are warm
            found, stats = tokens_of(executor, config, requests, drained, random.Random(5))
            assert found == alone, cell
            executor.apply(RowDiff(leave=tuple(range(6))))
        assert sum(stats.drafted_at) > 10
        if name == "itself":
            assert stats.accepted_at == stats.drafted_at
        if cell == "preempted":
            assert stats.num_preemptions > 0


def test_a_draft_of_the_same_model_is_always_right_however_it_was_interrupted(target, request_of):
    """Drafts that are asked for twice, thrown away, or made again from the draft's own prefix cache."""
    config = RuntimeConfig(num_threads=1, max_requests=2, max_step_tokens=32)
    executor = make_executor(target, config)
    drafter = Drafter(executor.model, executor.caps)
    sampling = SamplingState(temperature=1.0, seed=4)
    prompt = (3, 1, 4, 1, 5, 9, 2, 6)
    entry = RowEntry(row=0, request_id=0, token_ids=prompt, num_prompt_tokens=8, sampling=sampling)
    drafter.apply(RowDiff(enter=(entry,)))
    [first] = drafter.propose([(0, prompt)], 5)
    assert len(first) == 5
    assert drafter.propose([(0, prompt)], 5) == (first,)
    assert drafter.propose([(0, (*prompt, *first[:2]))], 3) == (first[2:],)
    drafter.apply(RowDiff(leave=(0,), enter=(entry,)))
    assert drafter.propose([(0, prompt)], 5) == (first,)
    other = (first[0] + 1) % target.spec.vocab_size
    [behind_other] = drafter.propose([(0, (*prompt, other))], 2)
    drafter.apply(RowDiff(leave=(0,), enter=(entry,)))
    assert drafter.propose([(0, (*prompt, other))], 2) == (behind_other,)
    drafter.apply(RowDiff(leave=(0,), enter=(entry,)))
    assert drafter.propose([(0, prompt)], 5) == (first,)


def test_a_draft_without_room_proposes_nothing(target, build_program, request_of, drained):
    short = source_of_program(build_program(max_context=16))
    config = RuntimeConfig(num_threads=1, max_requests=2, max_step_tokens=32, speculation="draft")
    executor = joined(target, short, config)
    requests = [request_of(0, range(3), 30), request_of(1, range(20), 6)]
    found, stats = tokens_of(executor, config, requests, drained)
    plain = RuntimeConfig(num_threads=1, max_requests=2, max_step_tokens=32)
    assert found == tokens_of(make_executor(target, plain), plain, requests, drained)[0]
    assert 0 < sum(stats.drafted_at) < 30


def test_costs_are_measured_and_leave_no_trace(target, drafts, request_of, drained):
    config = RuntimeConfig(num_threads=1, max_requests=3, max_step_tokens=32, speculation="draft")
    executor = joined(target, drafts["smaller"], config)
    costs = measure_costs(executor, config)
    for curve in (costs.decode, costs.verify):
        assert curve.points[0][0] == 1
        assert all(seconds > 0 for _, seconds in curve.points)
    assert [count for count, _ in costs.draft.points] == [count for count, _ in costs.draft_call.points]
    assert 0 <= costs.draft_s(1, 1) <= costs.draft_s(1, 2), "what is not hidden behind the last step"
    assert 0 < costs.draft_s(2, 1) <= costs.draft_s(2, 2)
    requests = requests_for(request_of, target.spec.vocab_size, 3)
    plain = RuntimeConfig(num_threads=1, max_requests=3, max_step_tokens=32)
    wanted = tokens_of(make_executor(target, plain), plain, requests, drained)[0]
    assert tokens_of(executor, config, requests, drained)[0] == wanted


def test_what_cannot_draft_is_refused():
    with pytest.raises(UsageError, match="speculation is set to ngram"):
        with_draft(RuntimeConfig(speculation="ngram"), "draft.llmc")
    simulated = SimulatedExecutor(simulated_caps())
    with pytest.raises(TargetError, match="simulated takes no part in speculation"):
        attach_draft(simulated, simulated)


@pytest.mark.slow
def test_the_distribution_under_drafts_is_the_model_s():
    """20,000 seeds: the first and the second token of a verified segment against softmax, by chi-square;
    and drafting with the same noise is right far more often than drafting with other noise."""
    rng = np.random.default_rng(0)
    vocab = 12
    logits = rng.normal(size=(2, vocab)).astype(np.float32)
    drafted = (logits[0] + 0.4 * rng.normal(size=vocab)).astype(np.float32)
    first, second, accepted = np.zeros(vocab), np.zeros(vocab), 0
    count = 20_000
    for seed in range(count):
        state = SamplingState(temperature=1.0, seed=seed)
        history = History(token_ids=[1, 2], num_prompt_tokens=2)
        draft = sample_token(drafted, state, history)
        result = sample_segment(0, logits, state, history, [draft])
        first[result.token_ids[0]] += 1
        accepted += result.num_accepted
        if result.num_accepted:
            second[result.token_ids[1]] += 1
    for counts, row in ((first, logits[0]), (second, logits[1])):
        expected = np.exp(row.astype(np.float64))
        expected *= counts.sum() / expected.sum()
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 31.3, chi_square  # 0.1 % of 11 degrees of freedom
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits[0].astype(np.float64), drafted.astype(np.float64)))
    chance = float((p * q).sum())
    assert accepted / count > 3 * chance
