"""Drafts drawn behind the step that verified the last ones, while its caller goes on: they are those that are
drawn when asked for, whatever comes between, and nobody waits for what nobody wants."""

from __future__ import annotations

import gc
import random
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest

from llmc.artifact.cpu import CPU_UNIT, decode_unit
from llmc.artifact.reader import open_artifact
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_loading import draft_config
from llmc.runtime.engine import Engine
from llmc.runtime.executors import drafting
from llmc.runtime.executors.cpu import executor_of, open_model, processor_features, runnable_levels
from llmc.runtime.executors.drafting import Drafter
from llmc.runtime.protocol import RowDiff, SamplingState
from llmc.runtime.request import FinishReason
from llmc.spec.errors import InternalError

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
SAMPLINGS = (
    SamplingState(),
    SamplingState(temperature=0.9, seed=7, top_p=0.95),
    SamplingState(temperature=1.2, seed=2**63 + 5, top_k=40, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingState(temperature=0.7, seed=3, min_tokens=9, banned_until_min=(1, 2), logit_bias=((5, 1.5),)),
)
CONFIG = RuntimeConfig(
    max_requests=4, max_step_tokens=64, max_model_len=256, speculation="draft", draft_tokens=2
)


class AlwaysWorth(drafting._Worth):
    """Draws ahead however long it takes."""

    pays = property(lambda self: True, lambda self, pays: None)


@pytest.fixture(scope="module")
def unit(cpu_artifact):
    artifact = open_artifact(cpu_artifact)
    return artifact, decode_unit(artifact.read_bytes(CPU_UNIT))


@pytest.fixture
def pair(unit, monkeypatch):
    """`pair(threads, ahead)`: an executor with a draft model of its own weights, some of them disturbed, and
    its drafter. It always draws ahead where it can."""
    monkeypatch.setattr(drafting, "_Worth", AlwaysWorth)
    opened = []

    def make(threads, ahead=True, config=CONFIG):
        artifact, described = unit
        level = runnable_levels(described, processor_features())[0]
        config = replace(config, num_threads=threads)
        target = executor_of(*open_model(artifact, described, level, config))
        other = executor_of(*open_model(artifact, described, level, draft_config(config, target)))
        disturb(other.model._model)
        drafter = Drafter(other.model, other.caps, target.model.ahead(other.model) if ahead else None)
        target.attach(drafter)
        opened.append(weakref.ref(target))
        return target, drafter

    yield make
    for each in opened:
        if (target := each()) is not None:
            target.close()


def disturb(model):
    """Changes the last bit of a few bytes of the weights, so that some drafts are wrong."""
    rng = np.random.default_rng(5)
    for weight in model._open.keywords["weights"]:
        weight ^= (rng.random(weight.shape) < 0.004).astype(np.uint8)


def history(engine, requests, seed, meddle):
    """Tokens and reasons of requests that arrive in between steps; `meddle(engine, rng)` after each step."""
    rng, pending, ended = random.Random(seed), list(requests), {}
    while pending or engine.has_work():
        while pending and (not engine.has_work() or rng.random() < 0.05):
            engine.add_request(pending.pop(0))
        ended |= {each.request_id: each.finished for each in engine.step() if each.finished}
        meddle(engine, rng)
    engine.blocks.check()
    assert engine.blocks.used() == [0] * len(engine.blocks.groups)
    return {number: (each.output_token_ids, each.reason) for number, each in ended.items()}


def meddle(engine, rng):
    """Ends or preempts one that runs, or has a step go without drafts, now and then."""
    running = list(engine._running.values())
    engine.speculates = rng.random() < 0.9
    if running and rng.random() < 0.02:
        engine.abort(rng.choice(running).request.request_id)
    elif running and rng.random() < 0.03:
        engine._preempt(rng.choice(running))


def requests_for(request_of, vocab, count, length=40):
    rng = random.Random(2)
    return [
        request_of(
            number,
            [rng.randrange(vocab) for _ in range(rng.randrange(1, 40))],
            length + number,
            SAMPLINGS[number % len(SAMPLINGS)],
            stop_token_ids=frozenset([11, 13]) if number % 3 == 2 else frozenset(),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_drafts_drawn_ahead_are_those_drawn_when_asked_for(pair, threads, request_of):
    """Alone and with others, aborted, preempted and stopped: the same drafts at every place, and tokens."""
    counts, told = [], []
    for ahead in (True, False):
        executor, drafter = pair(threads, ahead)
        requests = requests_for(request_of, executor.caps.vocab_size, 20)
        engine = Engine(executor, CONFIG)
        told.append(history(engine, requests, 4, meddle))
        counts.append((engine.stats.drafted_at, engine.stats.accepted_at, engine.stats.num_steps))
        assert (drafter.num_taken > 30) is ahead
    assert told[0] == told[1]
    assert counts[0] == counts[1]
    drafted, accepted = counts[0][0], counts[0][1]
    assert 0.2 * drafted[0] < accepted[0] < 0.98 * drafted[0], "some are wrong, some are right"
    assert {reason for _, reason in told[0].values()} >= {FinishReason.LENGTH, FinishReason.ABORT}


def test_tokens_are_those_without_drafts(pair, request_of):
    executor, drafter = pair(2)
    plain = replace(CONFIG, speculation="none")
    requests = requests_for(request_of, executor.caps.vocab_size, 4, length=90)
    calm = history(Engine(executor, plain), requests, 1, lambda engine, rng: None)
    executor.apply(RowDiff(leave=tuple(range(CONFIG.max_requests))))
    for draft_tokens in (1, 2, 5):
        config, before = replace(CONFIG, draft_tokens=draft_tokens), drafter.num_taken
        engine = Engine(executor, config)
        for request in requests:  # one at a time, as their drafts are drawn ahead then
            ended = history(engine, [request], 1, lambda engine, rng: None)
            assert ended == {request.request_id: calm[request.request_id]}
        assert drafter.num_taken - before > 0.9 * engine.stats.drafted_at[0] - 3 * len(requests)
        executor.apply(RowDiff(leave=tuple(range(CONFIG.max_requests))))


def test_drafts_that_end_where_positions_end(pair, request_of):
    """The last drafts of a context are drawn as long as there is room, and never beyond it."""
    executor, drafter = pair(2, config=replace(CONFIG, max_model_len=None))
    context = executor.caps.max_context
    engine = Engine(executor, replace(CONFIG, max_model_len=None))
    prompt = [number % 300 + 3 for number in range(context - 60)]
    ended = history(engine, [request_of(0, prompt, 60)], 1, lambda engine, rng: None)
    assert len(ended[0][0]) == 60
    assert drafter.num_taken > 5
    assert engine.stats.speculation_error is None


def test_refused_drafts_cost_speed_only(pair, request_of):
    """Where generated code refuses to draw, drafting is given up, and no request notices."""
    executor, drafter = pair(2)
    requests = requests_for(request_of, executor.caps.vocab_size, 1)
    expected = history(Engine(executor, replace(CONFIG, speculation="none")), requests, 1, lambda *_: None)
    executor.apply(RowDiff(leave=tuple(range(CONFIG.max_requests))))
    engine, rounds = Engine(executor, CONFIG), 4

    def spoil(engine, rng):
        if drafter.num_taken == 5:
            drafter._ahead._fields[-rounds] = 0

    assert history(engine, requests, 1, spoil) == expected
    assert "cannot go on for as many rounds" in (engine.stats.speculation_error or "")


def test_a_step_that_drafts_cannot_follow_is_refused(pair, request_of):
    executor, drafter = pair(2)
    requests = requests_for(request_of, executor.caps.vocab_size, 2)
    engine = Engine(executor, CONFIG)
    for request in requests:
        engine.add_request(request)
    executor.model._model.library.follow(drafter._ahead._ahead.buffer_info()[0])
    failed = [each.finished for each in engine.step() if each.finished]
    assert len(failed) == 2
    assert all("no drafts can be drawn behind it" in each.error for each in failed)
    assert len(history(engine, requests, 1, lambda *_: None)) == 2


@pytest.mark.parametrize("closed", [True, False])
def test_an_executor_ends_with_drafts_under_way(pair, request_of, closed):
    """Closed, or dropped without: what a worker still reads stays until it is done."""
    for _ in range(4):
        executor, drafter = pair(2)
        engine = Engine(executor, CONFIG)
        engine.add_request(request_of(0, [5, 6, 7], 60))
        while drafter.num_taken < 3:
            engine.step()
        assert drafter._is_ahead
        ahead, model = drafter._ahead, executor.model
        if closed:
            engine.close()
            assert ahead.take(is_wanted=True) is None
            with pytest.raises(InternalError, match="closed"):
                model.results([], [])
        gone = weakref.ref(ahead)
        del engine, executor, drafter, ahead, model
        gc.collect()
        assert gone() is None


def test_drafts_are_drawn_ahead_while_waiting_takes_less():
    worth = drafting._Worth()
    assert not worth.pays, "what a call takes is not known yet"
    for _ in range(5):
        worth.observe_call(60e-6, 2)
    assert worth.pays
    for _ in range(5):
        worth.observe_wait(10e-6, 2)
    assert worth.pays
    for _ in range(200):
        worth.observe_wait(90e-6, 2)
    assert not worth.pays
    for _ in range(drafting.RETRY_CALLS - 1):
        worth.observe_call(60e-6, 2)
    assert not worth.pays
    worth.observe_call(60e-6, 2)
    assert worth.pays, "it is tried again after a while"
