"""Recorded steps against launched ones, through the whole way of an artifact but for the GPU: its cubins in a
stub driver that records and replays launches, carried out by the interpreter."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from request_parts import Even, Knowing

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_policy import DraftPolicy
from llmc.runtime.engine import Engine
from llmc.runtime.load import load
from llmc.runtime.params import SamplingParams
from llmc.runtime.protocol import RowDiff, SamplingState
from llmc.runtime.request import FinishReason, Request
from llmc.runtime.server.messages import Failed, Generate
from llmc.runtime.server.process_channel import ProcessChannel
from llmc.runtime.speculation import Speculator
from llmc.spec.errors import ArtifactError, DeviceLostError, TargetError

SETTINGS = {"max_requests": 4, "max_step_tokens": 32, "max_model_len": 48}
PROMPTS = [(1, 50, 60), (1, 9), (1, 33)]
SAMPLINGS = [
    SamplingState(logprobs=2),
    SamplingState(temperature=0.9, top_p=0.8, top_k=40, seed=7),
    SamplingState(temperature=1.3, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.5, seed=2**63 + 5),
]


@pytest.fixture(scope="module")
def specialisations(cuda_artifact):
    from stub_executor import specialisations_of

    return specialisations_of(cuda_artifact)


@pytest.fixture
def stubbed(cuda_artifact, cuda_stub, specialisations):
    """`stubbed(config)`: an executor over the stub driver, and what carries its launches out."""
    from stub_device import Interpreted
    from stub_executor import stubbed_executor

    from llmc.kernels.cuda.interpreter import correct_interpreter

    correct_interpreter()
    library, log = cuda_stub
    log.write_text("")
    interpreted = Interpreted(library, specialisations)

    def make(free_bytes=1 << 30, **settings):
        config = RuntimeConfig(**SETTINGS | settings)
        return stubbed_executor(cuda_artifact, library, interpreted, config, free_bytes), config

    yield make, interpreted
    interpreted.close()
    assert interpreted.errors == []


def run_out(engine):
    while engine.has_work():
        engine.step()


def served(executor, config, prompts, samplings, count, drafts=None, forms=()):
    """Tokens, logprobs and reasons by request; a request comes in before each step, so that steps are mixed.
    `forms` are the requests whose answers have even tokens alone."""
    speculator = None if drafts is None else Speculator(Knowing(drafts), DraftPolicy(config.draft_tokens))
    engine = Engine(executor, config, speculator=speculator)
    coming = [
        Request(
            request_id=number,
            prompt_token_ids=prompt,
            max_tokens=count,
            sampling=sampling,
            grammar=Even() if number in forms else None,
        )
        for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    found = {number: [] for number in range(len(prompts))}
    logprobs = {number: [] for number in range(len(prompts))}
    reasons = {}
    while coming or engine.has_work():
        if coming:
            engine.add_request(coming.pop(0))
        for output in engine.step():
            found[output.request_id] += output.token_ids
            logprobs[output.request_id] += output.logprobs
            if output.finished is not None:
                reasons[output.request_id] = output.finished.reason
    executor.apply(RowDiff(leave=tuple(range(config.max_requests))))
    return found, logprobs, reasons


def watched(executor):
    """How many steps are in flight after each that is submitted."""
    counts, open_steps, submit, collect = [], set(), executor.submit, executor.collect

    def submitted(plan):
        ticket = submit(plan)
        open_steps.add(ticket)
        counts.append(len(open_steps))
        return ticket

    def collected(ticket):
        open_steps.remove(ticket)
        return collect(ticket)

    executor.submit, executor.collect = submitted, collected
    return counts


@pytest.mark.slow
def test_replayed_launched_and_oracle_sampled_steps_give_the_same_tokens(stubbed, cuda_artifact, cuda_stub):
    """Steps of prompts, of decoding, of both, and of drafts that are verified."""
    from llmc.runtime.executors.stepped import SteppedExecutor

    make, _ = stubbed
    log = cuda_stub[1]
    asked = (PROMPTS, SAMPLINGS, 3)
    executor, config = make(device_graphs=True, draft_tokens=2, prefix_cache=False)
    in_flight = watched(executor)
    replayed = served(executor, config, *asked, forms=(2,))
    # A step is enqueued before the tokens that it begins with have arrived, unless a form waits for them.
    assert set(in_flight) == {1, 2}
    steps = executor.num_replayed
    assert steps == len(in_flight)
    drafts = list(replayed[0].values())
    assert served(executor, config, *asked, drafts=drafts, forms=(2,)) == replayed
    # Accepted drafts are steps that nobody ran.
    assert executor.num_replayed < 2 * steps
    assert executor.num_launched == 0
    executor.close()
    nodes = max(map(int, re.findall(r"^replay (\d+)", log.read_text(), re.MULTILINE)))
    # The stub counts calls of torch's operators, too; the plan says about how many launches there are.
    assert nodes == pytest.approx(cuda_artifact.manifest.capture.num_launches, rel=0.5)
    launching, config = make(prefix_cache=False)
    assert served(launching, config, *asked, forms=(2,)) == replayed
    assert launching.num_replayed == 0
    stepped = SteppedExecutor(launching.model, replace(launching.caps, max_in_flight=1))
    assert served(stepped, config, *asked, forms=(2,)) == replayed
    launching.close()


def test_an_error_of_the_device_ends_its_steps_requests_and_the_engine(stubbed):
    make, interpreted = stubbed
    executor, config = make(device_graphs=True, max_requests=1, max_step_tokens=1)
    engine = Engine(executor, config)
    engine.add_request(Request(request_id=0, prompt_token_ids=(1, 5), max_tokens=4, sampling=SAMPLINGS[0]))
    interpreted.fail_after(5)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run_out(engine)
    assert engine.stats.finished == {FinishReason.ERROR: 1}
    interpreted.fail_after(-1)
    engine.close()


@pytest.mark.slow
def test_after_an_error_of_the_device_the_engine_starts_again_and_says_the_same(
    stubbed, cuda_artifact, cuda_stub, tmp_path
):
    """The executor of a real artifact in a process of its own, as a server has it."""
    make, _ = stubbed
    executor, config = make()
    expected, *_ = served(executor, config, PROMPTS[:1], SAMPLINGS[:1], 3)
    executor.close()
    child = Path(__file__).with_name("cuda_child.py")
    settings = msgspec.json.encode(config).decode()
    command = (
        sys.executable,
        str(child),
        str(cuda_artifact.path),
        str(cuda_stub[0]),
        settings,
        str(tmp_path / "mark"),
    )

    async def ask(channel):
        events = asyncio.Queue()
        channel.connect(lambda told: [events.put_nowait(event) for event in told])
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        channel.send(Generate(request_id="a", prompt_token_ids=PROMPTS[0], params=params))
        lost = await asyncio.wait_for(events.get(), 120)
        while not isinstance(lost, Failed):
            lost = await asyncio.wait_for(events.get(), 120)
        while not channel.snapshot().num_restarts or channel.snapshot().is_starting:
            await asyncio.sleep(0.05)
        channel.send(Generate(request_id="b", prompt_token_ids=PROMPTS[0], params=params))
        tokens = []
        while True:
            chunk = (await asyncio.wait_for(events.get(), 120)).chunk
            tokens += chunk.token_ids
            if chunk.finish_reason is not None:
                return lost, tokens, channel.snapshot()

    channel = ProcessChannel(command)
    first = channel.pid
    lost, tokens, snapshot = asyncio.run(ask(channel))
    assert channel.pid != first
    channel.close()
    assert (lost.code, lost.status) == ("cuda.device_lost", 503)
    assert tokens == expected[0]
    assert snapshot.num_restarts == 1
    assert "an illegal memory access" in snapshot.last_death


def test_what_cannot_run_is_refused_before_anything_is_loaded(stubbed, cuda_artifact, monkeypatch):
    make, interpreted = stubbed
    interpreted.pretend(11080)
    with pytest.raises(TargetError, match=r"supports CUDA 11.8, and they were made with CUDA 12"):
        make()
    interpreted.pretend(12080)
    monkeypatch.setattr("llmc.ir.weights.WeightStore.evaluate", None)
    with pytest.raises(TargetError, match=r"weights [0-9,]+, rows of requests .* and 1,000 are free"):
        make(free_bytes=1000, device_graphs=True)


def test_a_kernel_that_was_tampered_with_is_damage(cuda_artifact, tmp_path):
    copy = tmp_path / "copy.llmc"
    shutil.copytree(cuda_artifact.path, copy)
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    file = copy / unit.kernels[3].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=re.escape(unit.kernels[3].file)):
        load(copy)
