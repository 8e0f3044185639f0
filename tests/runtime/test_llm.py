"""The public face over a simulated model: texts, streams, stops, limits, and what callers do wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import subprocess
import sys
import threading
import time

import pytest

from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.simulated import Faults, SimulatedExecutor, simulated_caps, simulated_spec
from llmc.runtime.llm import LLM
from llmc.runtime.params import SamplingParams
from llmc.runtime.request import FinishReason
from llmc.spec.errors import InternalError, RequestError

pytestmark = pytest.mark.pure

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture
def make(letters):
    def made(faults=None, config=None, tokenizer=True, **caps):
        executor = SimulatedExecutor(simulated_caps(max_rows=4, max_in_flight=2, **caps), faults)
        spec, draw_seed = simulated_spec(executor.caps, (28,)), iter(range(10**6)).__next__
        return LLM(executor, letters() if tokenizer else None, spec, config, draw_seed=draw_seed)

    return made


@pytest.fixture
def llm(make):
    with make() as made:
        yield made
        made._loop.close()
        assert made.engine.blocks.used() == [0]


def collect(llm, prompt, params, **fields):
    async def run():
        return [chunk async for chunk in llm.stream(prompt, params, **fields)]

    return asyncio.run(run())


def test_results_come_in_the_order_of_the_prompts(llm):
    prompts = ["hello", [7, 8, 9], "abc abc abc", "z"]
    together = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in together] == ["hello", None, "abc abc abc", "z"]
    assert together[1].prompt_token_ids == (7, 8, 9)
    for prompt, output in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, GREEDY)[0]
        assert (alone.token_ids, alone.text) == (output.token_ids, output.text)
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert 0 < output.ttft_s <= output.completions[0].e2e_s
        assert output.tpot_s >= 0


def test_stream_is_the_text_in_pieces(llm):
    chunks = collect(llm, "hello", GREEDY)
    whole = llm.generate("hello", GREEDY)[0]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]


def test_stop_string_ends_and_does_not_show(llm):
    plain = llm.generate("hello", dataclasses.replace(GREEDY, ignore_eos=True))[0]
    stop = plain.text[7:10]
    output = llm.generate("hello", dataclasses.replace(GREEDY, ignore_eos=True, stop=("!", stop)))[0]
    assert output.text == plain.text[: plain.text.index(stop)]
    assert output.finish_reason is FinishReason.STOP
    assert output.completions[0].stop_reason == stop
    assert output.token_ids == plain.token_ids[: plain.text.index(stop) + 3]
    late = dataclasses.replace(GREEDY, ignore_eos=True, stop=(stop,), min_tokens=12)
    assert len(llm.generate("hello", late)[0].token_ids) >= 12


def test_stop_token_is_counted_and_has_no_text(llm):
    plain = llm.generate("hello", GREEDY)[0]
    token = plain.token_ids[5]
    output = llm.generate("hello", dataclasses.replace(GREEDY, stop_token_ids=(token,)))[0]
    first = plain.token_ids.index(token)
    assert output.token_ids == plain.token_ids[: first + 1]
    assert output.text == plain.text[:first]
    assert output.completions[0].stop_reason == token


def test_completions_differ_and_the_first_is_the_seeds_own(llm):
    params = SamplingParams(temperature=1.0, max_tokens=16, seed=5, ignore_eos=True)
    several = llm.generate("hello", dataclasses.replace(params, n=3))[0]
    assert len({each.token_ids for each in several.completions}) == 3
    assert several.token_ids == llm.generate("hello", params)[0].token_ids
    assert [each.index for each in several.completions] == [0, 1, 2]


def test_seedless_requests_draw_seeds(llm):
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    assert llm.generate("hello", params)[0].token_ids != llm.generate("hello", params)[0].token_ids


def test_logprobs_of_output_and_prompt(llm):
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=True, max_tokens=5)
    for _ in range(2):  # the second time the prompt is cached, and computed again for its logprobs
        output = llm.generate("hello world", params)[0]
        assert len(output.completions[0].logprobs) == len(output.token_ids)
        assert [each.token_id for each in output.prompt_logprobs] == list(output.prompt_token_ids[1:])
        for each in output.completions[0].logprobs:
            assert each.rank == 0
            assert each.top[0] == (each.token_id, each.logprob)
            assert len(each.top) == 3
        assert output.num_cached_tokens == 0
    again = llm.generate("hello world", GREEDY)[0]
    assert again.num_cached_tokens == 8


def test_defaults_are_the_models(llm):
    output = llm.generate("hello")[0]
    assert output.token_ids == llm.generate("hello", SamplingParams(temperature=0.0))[0].token_ids
    assert len(output.prompt_token_ids) + len(output.token_ids) <= llm.limits.max_model_len


def test_end_tokens_beyond_the_vocabulary_are_harmless(letters):
    caps = simulated_caps()
    with LLM(SimulatedExecutor(caps), letters(), simulated_spec(caps, (28, 5000))) as odd:
        assert odd.eos_token_ids == (28,)
        params = dataclasses.replace(GREEDY, min_tokens=20)
        assert len(odd.generate("hello", params)[0].token_ids) == 20


def test_more_prompts_than_the_queue_holds(make):
    with make(config=RuntimeConfig(max_requests=2, max_waiting=3)) as small:
        outputs = small.generate([[1 + n, 2] for n in range(12)], dataclasses.replace(GREEDY, n=2))
        assert len(outputs) == 12
        assert all(each.finish_reason for output in outputs for each in output.completions)


def test_abort_by_name_and_by_leaving(make):
    """The model waits in its eighth step, before any text can end, until the first text is aborted."""
    steps, aborted = 0, threading.Event()

    def wait_for_the_caller(plan):
        nonlocal steps
        steps += 1
        assert steps < 8 or aborted.wait(30)

    async def run(llm):
        reasons = []
        async for chunk in llm.stream("hello", SamplingParams(ignore_eos=True), request_id="mine"):
            if not reasons:
                llm.abort("mine")
                aborted.set()
            reasons.append(chunk.finish_reason)
        async for _ in llm.stream("left early", SamplingParams(ignore_eos=True)):
            break
        return reasons

    with make(Faults(on_submit=wait_for_the_caller)) as llm:
        assert asyncio.run(run(llm))[-1] is FinishReason.ABORT
        llm._loop.close()
        assert llm.engine.blocks.used() == [0]


def test_one_name_for_two_living_requests_is_refused(make):
    refused, steps = threading.Event(), itertools.count()

    def wait_for_commands(plan):
        """Behind the first tokens the engine goes on only where it is asked for something."""
        if next(steps) >= 2:
            while not (refused.is_set() or llm._loop._commands.qsize()):
                time.sleep(0.001)

    async def run():
        stream = llm.stream("hello", SamplingParams(ignore_eos=True), request_id="mine")
        await anext(stream)
        with pytest.raises(RequestError, match="'mine' is running"):
            await anext(llm.stream("hello", GREEDY, request_id="mine"))
        refused.set()
        await stream.aclose()

    with make(Faults(on_collect=wait_for_commands)) as llm:
        asyncio.run(run())


def test_threads_share_one_model(llm):
    expected = llm.generate("hello", GREEDY)[0].token_ids
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(llm.generate("hello", GREEDY)[0].token_ids))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", GREEDY, "The prompt is empty"),
        ([], GREEDY, "The prompt is empty"),
        ([1, 29], GREEDY, "Token 1 of the prompt is 29. The model's vocabulary has the ids 0 to 28"),
        ([1, -1], GREEDY, "Token 1 of the prompt is -1"),
        ([1, 2.5], GREEDY, "holds 2.5 where a token id was expected"),
        ([1] * 128, GREEDY, "The prompt has 128 tokens, and the context is 128 tokens"),
        ([1] * 100, SamplingParams(max_tokens=29), "max_tokens is 29 behind a prompt of 100 tokens"),
        ("a", SamplingParams(stop_token_ids=(29,)), "stop_token_ids is 29"),
        ("a", SamplingParams(logit_bias={99: 1.0}), "logit_bias is 99. Allowed is an integer from 0 to 28"),
        ("a\ud800", GREEDY, "Character 1 is half of a surrogate pair"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_requests_are_named(llm, prompt, params, words):
    with pytest.raises(RequestError, match=words.replace(".", r"\.")):
        llm.generate([prompt], params)
    with pytest.raises(RequestError):
        collect(llm, prompt, params)
    assert llm.generate("fine", GREEDY)[0].finish_reason is not None


def test_without_a_tokenizer_ids_go_in_and_out(make):
    with make(tokenizer=False) as bare:
        output = bare.generate([3, 4, 5], GREEDY)[0]
        assert output.text == ""
        assert len(output.token_ids) > 0
        with pytest.raises(RequestError, match="without a tokenizer"):
            bare.generate("text")
        with pytest.raises(RequestError, match="The request has a stop in text"):
            bare.generate([3], SamplingParams(stop="x"))


def test_a_corrupt_row_fails_alone(make):
    with make(Faults(nan_requests={1})) as corrupt:
        outputs = corrupt.generate([[1], [2], [3]], GREEDY)
        assert [output.finish_reason is FinishReason.ERROR for output in outputs] == [False, True, False]
        assert "cannot be sampled" in outputs[1].completions[0].error


def test_a_broken_engine_tells_every_caller(make):
    with make() as broken:
        broken.engine._scheduler.plan = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            broken.generate("hello", GREEDY)
        with pytest.raises(ZeroDivisionError):
            broken.generate("hello", GREEDY)


def test_a_closed_model_says_so(make):
    closed = make()
    closed.generate("hello", GREEDY)
    closed.close()
    closed.close()
    with pytest.raises(InternalError, match="The model is closed"):
        closed.generate("hello", GREEDY)


def test_closing_ends_what_runs(make):
    async def run():
        closing = make()
        stream = closing.stream("hello", SamplingParams(ignore_eos=True, max_tokens=100))
        await anext(stream)
        await asyncio.to_thread(closing.close)
        return [chunk async for chunk in stream][-1].finish_reason

    assert asyncio.run(run()) in (FinishReason.ABORT, FinishReason.LENGTH)


def test_deadline_ends_with_timeout(make):
    with make(config=RuntimeConfig(timeout_s=1e-9)) as hurried:
        assert hurried.generate("hello", GREEDY)[0].finish_reason is FinishReason.TIMEOUT


def test_a_request_may_bring_its_own_deadline(llm):
    late, fine = (
        llm.generate("hello", GREEDY, timeout_s=1e-9)[0],
        llm.generate("hello", GREEDY, timeout_s=60)[0],
    )
    assert late.finish_reason is FinishReason.TIMEOUT
    assert fine.finish_reason is not FinishReason.TIMEOUT
    assert collect(llm, "hello", GREEDY, timeout_s=1e-9)[-1].finish_reason is FinishReason.TIMEOUT


def test_lower_priority_numbers_run_first(make):
    order = []

    async def one(llm, priority):
        async for chunk in llm.stream("hello", GREEDY, priority=priority):
            if chunk.finish_reason is not None:
                order.append(priority)

    async def run(llm):
        blocker = llm.stream("first", SamplingParams(max_tokens=100, ignore_eos=True))
        await anext(blocker)
        tasks = [asyncio.create_task(one(llm, priority)) for priority in (3, 1, 2)]
        while llm._loop._commands.qsize() + len(llm._loop._by_name) < 1 + len(tasks):
            await asyncio.sleep(0.001)
        all_asked.set()
        async for _ in blocker:
            pass
        await asyncio.gather(*tasks)

    # The engine stands still behind the blocker's first tokens until all others wait for it.
    all_asked, steps = threading.Event(), itertools.count()
    held = Faults(on_collect=lambda plan: next(steps) < 2 or all_asked.wait(30))
    with make(held, RuntimeConfig(max_requests=1, order="priority")) as llm:
        asyncio.run(run(llm))
    assert order == [1, 2, 3]


def test_a_program_that_does_not_close_ends_cleanly():
    code = (
        "from llmc.runtime.executors.simulated import SimulatedExecutor, simulated_caps as caps\n"
        "from llmc.runtime.llm import LLM\n"
        "from llmc.spec.model import ModelSpec\n"
        "spec = ModelSpec(family='', architecture='', num_layers=1, hidden_size=1, vocab_size=29,"
        " max_context=9, compute_dtype='float32', tied_head=False, num_parameters=0, attention=())\n"
        "print(len(LLM(SimulatedExecutor(caps()), None, spec).generate([1, 2, 3])[0].token_ids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "125\n", "")


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_each_completion_says_what_became_of_its_drafts(make, kind):
    config = RuntimeConfig(speculation=kind, draft_tokens=3)
    with make(config=config, can_propose=True) as llm:
        params = SamplingParams(temperature=0.6, max_tokens=60, n=2, ignore_eos=True)
        outputs = llm.generate(["abababab", "once upon"], params)
        each = [completion for output in outputs for completion in output.completions]
        for counts, total in (
            ([one.drafted_at for one in each], llm.engine.stats.drafted_at),
            ([one.accepted_at for one in each], llm.engine.stats.accepted_at),
        ):
            summed = [sum(one[place] for one in counts if place < len(one)) for place in range(3)]
            assert summed == total
        assert all(sum(one.accepted_at) <= len(one.token_ids) for one in each)
        assert sum(llm.engine.stats.accepted_at) > 0
    with make() as llm:
        (plain,) = llm.generate("abababab", GREEDY)
        assert plain.completions[0].drafted_at == ()
