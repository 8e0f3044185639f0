"""The response cache: the same answer without a step, never another one, never more bytes than allowed."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import Faults, SimulatedExecutor, simulated_caps, simulated_spec
from llmc.runtime.llm import LLM
from llmc.runtime.outputs import StreamChunk
from llmc.runtime.params import SamplingParams
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import FinishReason, Request
from llmc.runtime.response_cache import ResponseCache, ResponseStats, response_key
from llmc.runtime.structured import StructuredOutput
from llmc.spec.errors import UsageError

pytestmark = pytest.mark.pure

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture
def make(letters):
    def made(response_cache_bytes=1 << 20, faults=None):
        executor = SimulatedExecutor(simulated_caps(max_rows=4, max_in_flight=2), faults)
        config = RuntimeConfig(response_cache_bytes=response_cache_bytes)
        spec, draw_seed = simulated_spec(executor.caps, (28,)), iter(range(10**6)).__next__
        return LLM(executor, letters(), spec, config, draw_seed=draw_seed, digest="one")

    return made


@pytest.fixture
def llm(make):
    with make() as made:
        yield made


def content(output):
    """All of a result that does not depend on when it was made."""
    plain = [dataclasses.replace(each, ttft_s=None, e2e_s=0.0) for each in output.completions]
    return output.prompt_token_ids, plain, output.prompt_logprobs


def stream(llm, prompt, params):
    async def run():
        return [chunk async for chunk in llm.stream(prompt, params)]

    return asyncio.run(run())


def counts(llm):
    stats = llm.engine.stats.responses
    return stats.num_hits, stats.num_misses


SEEDED = dataclasses.replace(GREEDY, temperature=1.0, seed=5)
TWICE = {
    "greedy": GREEDY,
    "end token": SamplingParams(temperature=0.0, max_tokens=60),
    "seeded": SEEDED,
    "several": dataclasses.replace(SEEDED, n=3),
    "logprobs": dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=True),
    "stop string": dataclasses.replace(SEEDED, stop=("a", "e", "i", "o", "u"), n=2),
    "stop token": dataclasses.replace(SEEDED, stop_token_ids=tuple(range(5, 12))),
    "odd stop": dataclasses.replace(GREEDY, stop=("\ud800",)),
    "form": dataclasses.replace(SEEDED, structured=StructuredOutput(regex="[a-c]{3,9}x")),
}


@pytest.mark.parametrize("name", TWICE)
def test_the_second_answer_is_the_first_without_a_step(llm, name):
    first = llm.generate("hello", TWICE[name])[0]
    while llm.engine.has_work():  # a step in flight behind the last token is still to be collected
        time.sleep(0.001)
    num_steps, num_finished = llm.engine.stats.num_steps, dict(llm.engine.stats.finished)
    second = llm.generate("hello", TWICE[name])[0]
    assert content(second) == content(first)
    assert (first.is_replayed, second.is_replayed) == (False, True)
    assert second.num_cached_tokens == len(second.prompt_token_ids)
    assert llm.engine.stats.num_steps == num_steps
    assert llm.engine.stats.finished == num_finished
    assert counts(llm) == (1, 1)


def test_a_stream_gets_the_pieces_the_response_was_made_in(llm):
    params = dataclasses.replace(SEEDED, n=2, logprobs=1, stop=("e",))
    first, second = stream(llm, "hello", params), stream(llm, "hello", params)

    def lasting(chunk):
        return msgspec.structs.replace(
            chunk, request_id="", time_s=0.0, admitted_s=None, num_cached_tokens=0, is_replayed=False
        )

    assert list(map(lasting, second)) == list(map(lasting, first))
    assert len(second) > 2
    assert {chunk.request_id for chunk in second} != {chunk.request_id for chunk in first}
    assert all(chunk.is_replayed for chunk in second)


OTHERS = {
    "max_tokens": 19,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "stop": ("zzz",),
    "stop_token_ids": (3,),
    "seed": 6,
    "n": 2,
    "logprobs": 0,
    "prompt_logprobs": True,
    "ignore_eos": False,
    "min_tokens": 3,
    "logit_bias": {4: 1.0},
    "skip_special_tokens": False,
    "structured": StructuredOutput(regex="[a-z]{30}"),
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
}


def test_every_parameter_tells_requests_apart(llm):
    assert set(OTHERS) == {field.name for field in dataclasses.fields(SamplingParams)}
    base = dataclasses.replace(SEEDED, ignore_eos=True)
    llm.generate("hello", base)
    for name, value in OTHERS.items():
        before = counts(llm)
        llm.generate("hello", dataclasses.replace(base, **{name: value}))
        assert counts(llm) == (0, before[1] + 1), f"{name} was overlooked"
    llm.generate("hellp", base)
    assert counts(llm)[0] == 0
    llm.generate("hello", base)
    assert counts(llm)[0] == 1


def test_the_key_names_the_artifact_and_ignores_who_asks():
    def key(digest="a", params=GREEDY, **fields):
        request = Request(
            request_id=fields.pop("number", 0),
            prompt_token_ids=fields.pop("prompt", (1, 2)),
            max_tokens=20,
            sampling=SamplingState(**fields.pop("sampling", {})),
            **fields,
        )
        return response_key(digest, [request], params)

    assert key() != key("b")
    assert key() == key(number=7, priority=3, deadline_s=5.0, key="me", arrival_s=2.0)
    assert key(sampling={"seed": 1}) == key(sampling={"seed": 2})
    seeded = {"temperature": 1.0, "seed": 1}
    assert key(sampling=seeded) != key(sampling={**seeded, "seed": 2})
    assert len({key(prompt=ids) for ids in ((1, 2), (12,), (2, 1), (1, 2, 1))}) == 4
    split = [dataclasses.replace(GREEDY, stop=stop) for stop in (("a", "b"), ("ab",), ("a', 'b",), ())]
    assert len({key(params=params) for params in split}) == 4


def test_what_is_sampled_without_a_seed_is_never_kept(llm):
    unseeded = dataclasses.replace(GREEDY, temperature=1.0)
    texts = {llm.generate("hello", unseeded)[0].text for _ in range(3)}
    assert len(texts) == 3
    assert counts(llm) == (0, 0)
    told = queue.SimpleQueue()
    for _ in range(2):
        llm.submit("hello", dataclasses.replace(unseeded, seed=9), told.put, seed_is_drawn=True)
        while (chunk := told.get(timeout=10)).finish_reason is None:
            assert not chunk.is_replayed
    assert counts(llm) == (0, 0)


def test_without_bytes_there_is_no_cache(make):
    with make(response_cache_bytes=0) as off:
        assert not any(off.generate("hello", GREEDY)[0].is_replayed for _ in range(2))
        assert off.engine.stats.responses == ResponseStats()
    with pytest.raises(UsageError, match="response_cache_bytes"):
        RuntimeConfig(response_cache_bytes=-1).validate()


class Held:
    """An engine that, behind a first token, goes on only where it is asked for something, freed or closed."""

    def __init__(self):
        self.is_free = threading.Event()
        self.faults = Faults(on_collect=self._wait)
        self.llm = None
        self._steps = itertools.count()

    def hold(self):
        self._steps = itertools.count()
        self.is_free.clear()

    def _wait(self, plan):
        if next(self._steps) >= 2:
            loop = self.llm._loop
            while not (self.is_free.is_set() or loop._is_closed or loop._commands.qsize()):
                time.sleep(0.001)


@pytest.fixture
def held(make):
    holding = Held()
    holding.llm = make(faults=holding.faults)
    with holding.llm:
        yield holding
        holding.is_free.set()


async def whole(stream):
    return [chunk async for chunk in stream]


def content_of(chunks):
    """What a stream said of each completion, however it was cut."""
    parts = {}
    for chunk in chunks:
        text, tokens, logprobs, prompt, reason = parts.get(chunk.index, ("", (), (), (), None))
        assert reason is None
        parts[chunk.index] = (
            text + chunk.text,
            tokens + chunk.token_ids,
            logprobs + chunk.logprobs,
            prompt + chunk.prompt_logprobs,
            chunk.finish_reason,
        )
    return parts


def test_bad_endings_are_not_kept(held):
    llm, long = held.llm, dataclasses.replace(GREEDY, max_tokens=90)
    held.faults.nan_requests.add(0)
    held.is_free.set()
    assert llm.generate("hello", GREEDY)[0].finish_reason is FinishReason.ERROR
    late = llm.generate("hello", dataclasses.replace(GREEDY, max_tokens=100), timeout_s=1e-9)[0]
    assert late.finish_reason is FinishReason.TIMEOUT
    held.hold()

    async def leave():
        async for _ in llm.stream("hello", long):
            break

    asyncio.run(leave())
    held.is_free.set()
    assert not llm.generate("hello", long)[0].is_replayed
    assert not llm.generate("hello", GREEDY)[0].is_replayed
    assert llm.generate("hello", GREEDY)[0].is_replayed
    assert llm.engine.stats.responses.num_responses == 2


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("leaves", [False, True])
def test_who_asks_for_what_is_being_made_hears_it(held, make, name, leaves):
    """Three ask for the same; the first may leave while the others have had a part of it."""
    params, llm = TWICE[name], held.llm
    with make(response_cache_bytes=0) as plain:
        wanted = content_of(stream(plain, "hello", params))

    async def run():
        first = llm.stream("hello", params)
        began = [await anext(first)]
        later = [asyncio.create_task(whole(llm.stream("hello", params))) for _ in range(2)]
        while llm.engine.stats.responses.num_hits < 2:
            await asyncio.sleep(0.001)
        if leaves:
            await first.aclose()
        held.is_free.set()
        rest = [] if leaves else await whole(first)
        return [*began, *rest], await asyncio.gather(*later)

    made, heard = asyncio.run(run())
    for chunks in heard if leaves else (made, *heard):
        assert content_of(chunks) == wanted
    again = llm.generate("hello", params)[0]
    assert again.is_replayed or leaves
    assert [each.token_ids for each in again.completions] == [wanted[place][1] for place in range(params.n)]
    assert not llm._loop._making
    assert not llm._loop._by_name
    if not leaves:
        assert sum(llm.engine.stats.finished.values()) == params.n


def test_followers_end_by_themselves(held):
    """One leaves, one breaks over its text, one has a deadline and so follows nobody."""
    llm, told = held.llm, queue.SimpleQueue()

    def breaks(chunk):
        if isinstance(chunk, Exception):
            told.put(chunk)
        else:
            raise ValueError("no more")

    async def run():
        first = llm.stream("hello", GREEDY)
        began = await anext(first)
        follower = llm.stream("hello", GREEDY, request_id="mine")
        await anext(follower)
        llm.submit("hello", GREEDY, lambda chunk: None, "bare")
        own = asyncio.create_task(whole(llm.stream("hello", GREEDY, timeout_s=100)))
        llm.abort("mine")
        ends = [chunk.finish_reason async for chunk in follower]
        held.is_free.set()
        rest = await whole(first)
        return content_of([began, *rest]), ends, content_of(await own)

    made, ends, own = asyncio.run(run())
    assert ends[-1] is FinishReason.ABORT
    assert own == made
    assert llm.engine.stats.finished == {FinishReason.LENGTH: 2}
    llm.submit("hello", dataclasses.replace(GREEDY, max_tokens=90), lambda chunk: None)
    llm.submit("hello", dataclasses.replace(GREEDY, max_tokens=90), breaks)
    assert isinstance(told.get(timeout=30), ValueError)
    assert llm.generate("hello", dataclasses.replace(GREEDY, max_tokens=90))[0].finish_reason


def test_closing_ends_followers(held):
    llm = held.llm

    async def run():
        first = llm.stream("hello", GREEDY)
        await anext(first)
        follower = llm.stream("hello", GREEDY)
        await anext(follower)
        closing = asyncio.create_task(asyncio.to_thread(llm.close))
        ends = [chunk.finish_reason for chunk in await whole(follower)]
        await closing
        return ends

    assert asyncio.run(run())[-1] is FinishReason.ABORT


def chunk_of(text, reason=None):
    return StreamChunk(request_id="x", text=text, token_ids=tuple(range(len(text))), finish_reason=reason)


@given(
    st.integers(0, 3000),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 900)), max_size=60),
)
def test_bytes_stay_bounded_and_the_last_used_stay(max_bytes, events):
    """Against the plainest model: a list in order of use."""
    stats = ResponseStats()
    cache = ResponseCache(max_bytes, stats)
    order: list[tuple[bytes, int, str]] = []
    for number, size in events:
        key = bytes([number])
        known = next((each for each in order if each[0] == key), None)
        found = cache.get(key)
        assert (found is None) == (known is None)
        if known is not None:
            assert "".join(chunk.text for chunk in found) == known[2]
            order.remove(known)
            order.append(known)
            continue
        recorder = cache.recorder(key)
        text = "x" * size
        recorder.add(chunk_of(text[: size // 2]))
        recorder.add(chunk_of(text[size // 2 :], FinishReason.LENGTH))
        before = stats.num_bytes
        num_evictions = stats.num_evictions
        cache.keep(recorder)
        assert 0 <= stats.num_bytes <= max_bytes
        if cache._responses.get(key) is None:
            assert stats.num_bytes == before, "what is not kept must push nothing out"
            continue
        del order[: stats.num_evictions - num_evictions]
        order.append((key, size, text))
        assert [each[0] for each in order] == list(cache._responses)
        assert stats.num_responses == len(order)


def test_small_caches_let_the_oldest_go(make):
    with make(response_cache_bytes=1500) as llm:
        for prompt in ("aa", "bb", "cc", "dd"):
            llm.generate(prompt, GREEDY)
        assert llm.generate("dd", GREEDY)[0].is_replayed
        assert not llm.generate("aa", GREEDY)[0].is_replayed
        stats = llm.engine.stats.responses
        assert stats.num_evictions >= 2
        assert stats.num_bytes <= 1500
