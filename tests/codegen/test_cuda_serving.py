"""What requests may ask of an engine, over a CUDA executor whose kernels are interpreted: shared prefixes,
drafts, preemption and forms of answers change no token."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
from prometheus_client import generate_latest
from request_parts import Even, Knowing

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.runtime.bench.client import Endpoint
from llmc.runtime.bench.measures import Limits
from llmc.runtime.bench.runs import Load, bench_throughput
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_policy import DraftPolicy
from llmc.runtime.engine import Engine
from llmc.runtime.llm import LLM
from llmc.runtime.page_budget import bytes_of
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import FinishReason, Request
from llmc.runtime.server.channel import LocalChannel
from llmc.runtime.server.config import ServerConfig
from llmc.runtime.server.process import Server, listen
from llmc.runtime.server.state import make_state
from llmc.runtime.speculation import Speculator
from llmc.runtime.tokenizer import Tokenizer

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
GREEDY, SEEDED = SamplingState(), SamplingState(temperature=0.9, top_p=0.9, seed=5)
# Longer than a page of 64 tokens.
LONG = tuple(3 + (7 * index) % 40 for index in range(62))


@pytest.fixture(scope="module")
def executor_of(cuda_artifact):
    """`executor_of(**settings)`: an interpreting executor, and its settings."""
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit
    from llmc.runtime.executors.cuda import Machine, make_executor
    from llmc.runtime.executors.cuda_device import Device

    correct_interpreter()
    assert decode_unit(cuda_artifact.read_bytes(CUDA_UNIT)).kernels

    def make(**settings):
        config = RuntimeConfig(max_requests=2, max_step_tokens=64, max_model_len=128, **settings)
        machine = Machine(
            device=Device("cpu"), launcher=launch_jit, recorder=None, free_bytes=1 << 30, details={}
        )
        return make_executor(cuda_artifact, config, machine), config

    return make


@pytest.fixture(scope="module")
def engine_of(executor_of):
    """`engine_of(**settings)`: an engine over an interpreting executor."""

    def make(speculator=None, **settings):
        executor, config = executor_of(**settings)
        return Engine(executor, config, speculator=speculator)

    return make


def tokens_of(engine, *requests):
    """Tokens of requests that run at the same time, and what outputs said of them."""
    for number, (prompt, count, sampling, grammar) in enumerate(requests):
        engine.add_request(
            Request(
                request_id=number,
                prompt_token_ids=prompt,
                max_tokens=count,
                sampling=sampling,
                grammar=grammar,
            )
        )
    tokens, told = {number: [] for number in range(len(requests))}, []
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            told.append(output)
    reasons = {each.finished.reason for each in told if each.finished is not None}
    assert reasons <= {FinishReason.LENGTH, FinishReason.STOP}
    return list(tokens.values()), told


def test_a_preempted_request_and_one_with_a_known_prefix_get_their_tokens(engine_of, cuda_artifact):
    first, second = (LONG, 5, GREEDY, None), ((4, *LONG[1:]), 5, SEEDED, None)
    alone = engine_of()
    expected = [tokens_of(alone, each)[0][0] for each in (first, second)]
    again, told = tokens_of(alone, ((*LONG, *expected[0][:4]), 1, GREEDY, None))
    assert max(each.num_cached_tokens for each in told) == 64
    assert again[0] == expected[0][4:]
    alone.close()
    # Room for three pages: both grow into a second one, and one of them has to give its first.
    few = engine_of(cache_bytes=bytes_of(cuda_artifact.manifest.cache, (3,)), prefix_cache=False)
    found, _ = tokens_of(few, first, second)
    assert few.stats.num_preemptions > 0
    assert found == expected
    few.close()


def test_drafts_change_no_token(engine_of):
    prompt = (5, 9, 11, 5, 9, 11, 5, 9, 11, 5, 9)
    requests = ((prompt, 7, GREEDY, None), (prompt, 7, SEEDED, None))
    plain = engine_of()
    expected, _ = tokens_of(plain, *requests)
    plain.close()
    drafting = engine_of(speculator=Speculator(Knowing(expected), DraftPolicy(3)), draft_tokens=3)
    found, told = tokens_of(drafting, *requests)
    drafted, accepted = (
        sum(getattr(each, name) for each in told) for name in ("num_drafted", "num_accepted")
    )
    assert 0 < accepted < drafted
    assert found == expected
    drafting.close()


def test_the_form_of_one_answer_is_not_anothers(engine_of):
    prompt = LONG[:6]
    engine = engine_of()
    free = tokens_of(engine, (prompt, 5, GREEDY, None))[0][0]
    (formed, sampled), _ = tokens_of(engine, (prompt, 5, GREEDY, Even()), (prompt, 5, SEEDED, Even()))
    assert len(formed) == len(sampled) == 5
    assert not any(token % 2 for token in formed + sampled)
    (beside, _), _ = tokens_of(engine, (prompt, 5, GREEDY, None), (prompt, 5, SEEDED, Even()))
    assert beside == free
    engine.close()


def test_an_aborted_request_gives_its_pages_back_and_is_not_noticed(engine_of):
    engine = engine_of()
    alone = tokens_of(engine, (LONG[:9], 6, SEEDED, None))[0][0]
    for number in range(2):
        engine.add_request(
            Request(
                request_id=number, prompt_token_ids=LONG[number : 9 + number], max_tokens=6, sampling=SEEDED
            )
        )
    told = []
    while len(told) < 3:  # both are under way, and a step that they are in is enqueued
        told += engine.step()
    assert engine.abort(1)
    while engine.has_work():
        told += engine.step()
    reasons = {each.request_id: each.finished.reason for each in told if each.finished is not None}
    assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.ABORT}
    assert [token for each in told if each.request_id == 0 for token in each.token_ids] == alone
    assert engine.blocks.used() == [0] * len(engine.blocks.groups)
    engine.close()


@contextmanager
def served(artifact, executor, runtime):
    """A server over `executor` on loopback: its address and state."""
    config, is_ready, loops = ServerConfig(port=0), threading.Event(), []
    tokenizer = Tokenizer.from_folder(artifact.tokenizer_folder)
    llm = LLM(executor, tokenizer, artifact.manifest.spec, runtime)
    state = make_state(config, [("model", LocalChannel(llm), tokenizer)])
    server = Server(state, listen(config), is_ready.set)

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve(handle_signals=False)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert is_ready.wait(60)
        yield f"http://127.0.0.1:{server.port}", state
    finally:
        for _ in range(2):
            loops[0].call_soon_threadsafe(server.begin_drain)
        thread.join(60)
        llm.close()


def test_the_bench_measures_a_server_over_it(executor_of, cuda_artifact):
    """`llmc bench` and the metrics, over HTTP, of an executor of kernels."""
    with served(cuda_artifact, *executor_of()) as (url, state):
        load = Load(lengths="fixed:4,3", num_requests=2, vocab_size=cuda_artifact.manifest.spec.vocab_size)
        found = bench_throughput(Endpoint(url=url, model="model"), load, Limits())
        assert (found["requests"], found["errors"], found["output_tokens"]) == (2, 0, 6)
        text = generate_latest(state.metrics.registry).decode()
    assert 'llmc:generation_tokens_total{model_name="model"} 6.0' in text
