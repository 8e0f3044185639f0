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
from torch.overrides import TorchFunctionMode

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.artifact.oracle import read_oracle
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.draft_policy import DraftPolicy
from llmc.runtime.engine import Engine
from llmc.runtime.executors.cuda import Machine, make_executor
from llmc.runtime.executors.cuda_device import Device
from llmc.runtime.executors.cuda_driver import CudaDriver
from llmc.runtime.executors.cuda_graphs import record
from llmc.runtime.executors.cuda_kernels import CudaKernels
from llmc.runtime.executors.tiles import SequencePart
from llmc.runtime.load import load
from llmc.runtime.params import SamplingParams
from llmc.runtime.proof import check_executor
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
    executor, config = make(device_graphs="on", draft_tokens=2, prefix_cache=False)
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
    launching, config = make(prefix_cache=False, device_graphs="off", device_lists="on")
    assert served(launching, config, *asked, forms=(2,)) == replayed
    assert launching.num_replayed == 0
    launching.run_by(())
    stepped = SteppedExecutor(launching.model, replace(launching.caps, max_in_flight=1))
    assert served(stepped, config, *asked, forms=(2,)) == replayed
    launching.close()


@pytest.mark.slow
def test_lists_compute_what_operators_compute(stubbed):
    """Prompts and decoding, with and without logits."""
    make, _ = stubbed
    executor, _ = make(device_graphs="off")
    prompt, more = (1, 9, 33), (2, 7)
    steps = [
        [SequencePart(start=0, token_ids=prompt, block_tables=[[1]])],
        [
            SequencePart(start=3, token_ids=(5,), block_tables=[[1]], wanted=(0,)),
            SequencePart(start=0, token_ids=more, block_tables=[[0]], wanted=(1,)),
        ],
    ]
    model, found = executor.launched, []
    for model.uses_lists in (True, False):
        logits = [model.forward(step, lambda ids: None) for step in steps[:1]]
        assert logits == [None]
        found.append([model.forward(step, lambda ids: None).clone() for step in steps[1:]])
    assert all(own.equal(other) for own, other in zip(*found, strict=True))
    assert [len(each) for each in found[0]] == [2]
    executor.close()


def test_an_error_of_the_device_ends_its_steps_requests_and_the_engine(stubbed):
    make, interpreted = stubbed
    executor, config = make(device_graphs="on", max_requests=1, max_step_tokens=1)
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
    executor, config = make(device_graphs="off")
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


@pytest.mark.slow
def test_recorded_steps_that_do_nothing_are_given_up_when_loading(
    stubbed, cuda_artifact, monkeypatch, caplog
):
    """The oracle holds, lists give its tokens, replays do not: the model runs without them, and says so."""
    monkeypatch.setattr("llmc.runtime.proof._PROMPTS", 1)
    monkeypatch.setattr("llmc.runtime.proof._TOKENS", 2)
    oracle = read_oracle(cuda_artifact)
    oracle = replace(oracle, prompts=tuple(_first_tokens(prompt, 4) for prompt in oracle.prompts[:1]))
    make, _ = stubbed
    executor, _ = make(max_requests=1, max_step_tokens=8)
    assert dict(executor.ways) == {"recorded steps": False, "launch lists": False}
    monkeypatch.setattr("llmc.runtime.executors.cuda_graphs.Recorded.replay", lambda recorded: None)
    check_executor(executor, oracle)
    assert dict(executor.ways) == {"launch lists": False}
    assert "The GPU runs without recorded steps" in caplog.text
    assert "device_graphs=off" in caplog.text
    assert "Prompt 0 of the oracle gives" in executor.caps.details["recorded steps"]
    assert executor.num_replayed
    executor.close()


def _first_tokens(prompt, count):
    return replace(
        prompt,
        token_ids=prompt.token_ids[:count],
        logprobs=prompt.logprobs[: count - 1],
        best_ids=prompt.best_ids[: count - 1],
        margins=prompt.margins[: count - 1],
    )


def stub_machine(artifact, stub, recorder):
    """A machine whose launches reach the stub driver and are carried out by nobody."""
    device, driver = Device("cpu"), CudaDriver(str(stub[0]))
    kernels = CudaKernels(
        artifact, decode_unit(artifact.read_bytes(CUDA_UNIT)), (9, 0), driver, lambda: device.stream
    )
    return Machine(
        device=device,
        launcher=kernels,
        recorder=recorder(driver, device),
        free_bytes=1 << 30,
        details={"device": "a stub"},
        pack=kernels.pack,
    )


class Copies(TorchFunctionMode):
    """Notes what moves values between tensors, and whether that may wait for a device."""

    def __init__(self):
        super().__init__()
        self.waiting, self.sent = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("to", "copy_", "cpu", "cuda", "item", "tolist"):
            self.sent += 1
            if not (kwargs or {}).get("non_blocking"):
                self.waiting.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_enqueuing_a_step_never_waits_for_the_device(cuda_artifact, cuda_stub, graphs):
    """Rows that enter with all kinds of tables, block tables that change, prompts and forms: by lists and by
    graphs everything is sent by copies that do not wait."""
    machine = stub_machine(
        cuda_artifact,
        cuda_stub,
        lambda driver, device: lambda work: record(driver, device.stream, work),
    )
    config = RuntimeConfig(**SETTINGS, device_graphs=graphs)
    executor = make_executor(cuda_artifact, config, machine)
    biased = SamplingState(
        logit_bias=((5, 1.0),), min_tokens=2, banned_until_min=(1,), repetition_penalty=1.5, logprobs=1
    )
    sampled = SamplingState(temperature=0.5, top_k=5)
    engine = Engine(executor, config)
    requests = zip(PROMPTS, (biased, sampled, sampled), (None, None, Even()), strict=True)
    for number, (prompt, sampling, grammar) in enumerate(requests):
        engine.add_request(
            Request(
                request_id=number,
                prompt_token_ids=prompt,
                max_tokens=2,
                sampling=sampling,
                grammar=grammar,
            )
        )
    copies, plans = Copies(), []
    apply, submit = executor.apply, executor.submit

    def watched_apply(diff):
        with copies:
            apply(diff)

    def watched_submit(plan):
        plans.append(plan)
        with copies:
            return submit(plan)

    executor.apply, executor.submit = watched_apply, watched_submit
    engine.step()
    engine.close()
    assert plans[0].block_changes
    assert plans[0].grammar_mask is not None
    assert bool(executor.num_replayed) == (graphs == "on")
    assert copies.sent > 6
    assert copies.waiting == []


@pytest.mark.parametrize("switch", ["auto", "on"])
def test_a_driver_that_does_not_record_costs_the_replays_alone(cuda_artifact, cuda_stub, caplog, switch):
    """Nothing is carried out."""

    def refuse(work):
        raise TargetError("cuda.driver", "The GPU's driver reported an error.", "Code 900.", "Check it.")

    machine = stub_machine(cuda_artifact, cuda_stub, lambda driver, device: refuse)
    config = RuntimeConfig(**SETTINGS, device_graphs=switch)
    if switch == "on":
        with pytest.raises(TargetError, match="Code 900"):
            make_executor(cuda_artifact, config, machine)
        return
    executor = make_executor(cuda_artifact, config, machine)
    assert dict(executor.ways) == {"launch lists": False}
    assert executor.caps.details["device"] == "a stub"
    assert "Recording failed: The GPU's driver reported an error. Code 900." in caplog.text
    executor.close()


def test_what_cannot_run_is_refused_before_anything_is_loaded(stubbed, cuda_artifact, monkeypatch):
    make, interpreted = stubbed
    interpreted.pretend(11080)
    with pytest.raises(TargetError, match=r"supports CUDA 11.8, and they were made with CUDA 12"):
        make()
    interpreted.pretend(12080)
    monkeypatch.setattr("llmc.ir.weights.WeightStore.evaluate", None)
    with pytest.raises(TargetError, match=r"weights [0-9,]+, rows of requests .* and 1,000 are free"):
        make(free_bytes=1000, device_graphs="on")


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
