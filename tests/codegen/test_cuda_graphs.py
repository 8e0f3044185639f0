"""Recorded steps against launched ones, through the whole way of an artifact but for the GPU: its cubins in a
stub driver that records and replays launches, carried out by the interpreter."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.artifact.schema import PROGRAM
from llmc.codegen.cuda.dry_walk import needs_of
from llmc.ir.document import decode_program
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.engine import Engine
from llmc.runtime.load import load
from llmc.runtime.protocol import SamplingState
from llmc.runtime.request import FinishReason, Request
from llmc.spec.errors import ArtifactError, DeviceLostError, TargetError

SETTINGS = {"max_requests": 4, "max_step_tokens": 32, "max_model_len": 48}
PROMPTS = [(1, 50, 60, 70, 80), (1, 9), (1, 33, 44)]
SAMPLINGS = [
    SamplingState(),
    SamplingState(temperature=0.9, top_p=0.8, top_k=40, seed=7),
    SamplingState(temperature=1.3, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.5, seed=2**63 + 5),
]


@pytest.fixture(scope="module")
def specialisations(cuda_artifact):
    """What was compiled, found again from the artifact's own program."""
    artifact, manifest = cuda_artifact, cuda_artifact.manifest
    unit, document = decode_unit(artifact.read_bytes(CUDA_UNIT)), decode_program(artifact.read_bytes(PROGRAM))
    views = {name: view for _, held in artifact.weight_files() for name, view in held.items()}
    for word in unit.words:
        views[word.codes] = views[word.stored]
    weights = {
        name: SimpleNamespace(shape=view.shape, dtype=getattr(torch, view.dtype))
        for name, view in views.items()
    }
    program = SimpleNamespace(
        graph=document.graph,
        inputs=document.inputs,
        cache=manifest.cache,
        capture=manifest.capture,
        spec=manifest.spec,
    )
    needs = needs_of(program, weights)
    assert needs.arenas == unit.arenas
    return {each.key: each for each in needs.kernels}


@pytest.fixture
def stubbed(cuda_artifact, cuda_stub, specialisations):
    """`stubbed(config)`: an executor over the stub driver, and what carries its launches out."""
    from stub_device import Interpreted

    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.runtime.executors.cuda import Machine, make_executor
    from llmc.runtime.executors.cuda_device import Device
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_graphs import record
    from llmc.runtime.executors.cuda_kernels import CudaKernels

    correct_interpreter()
    library, log = cuda_stub
    log.write_text("")
    interpreted = Interpreted(library, specialisations)
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))

    def make(free_bytes=1 << 30, **settings):
        device, driver = Device("cpu"), CudaDriver(str(library))
        kernels = CudaKernels(cuda_artifact, unit, (9, 0), driver, lambda: device.stream)
        interpreted.know(kernels)
        machine = Machine(
            device=device,
            launcher=kernels,
            recorder=lambda work: record(driver, device.stream, interpreted.enqueued(work)),
            free_bytes=free_bytes,
            details={},
        )
        config = RuntimeConfig(**SETTINGS, **settings)
        return make_executor(cuda_artifact, config, machine), config

    yield make, interpreted
    interpreted.close()
    assert interpreted.errors == []


def run_out(engine):
    while engine.has_work():
        engine.step()


def served(executor, config, prompts, samplings, count):
    """Tokens and logprobs by request."""
    engine = Engine(executor, config)
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        engine.add_request(
            Request(request_id=number, prompt_token_ids=prompt, max_tokens=count, sampling=sampling)
        )
    found = {number: [] for number in range(len(prompts))}
    logprobs = {number: [] for number in range(len(prompts))}
    reasons = {}
    while engine.has_work():
        for output in engine.step():
            found[output.request_id] += output.token_ids
            logprobs[output.request_id] += output.logprobs
            if output.finished is not None:
                reasons[output.request_id] = output.finished.reason
    return found, logprobs, reasons


@pytest.mark.slow
def test_replayed_launched_and_oracle_sampled_steps_give_the_same_tokens(stubbed, cuda_artifact):
    from llmc.runtime.executors.stepped import SteppedExecutor

    make, _ = stubbed
    executor, config = make(device_graphs=True)
    replayed = served(executor, config, PROMPTS, SAMPLINGS, 4)
    # Steps run ahead: after the prompts, every token but the first came from a recorded step.
    assert executor.num_replayed >= 3
    executor.close()
    launching, config = make()
    assert served(launching, config, PROMPTS, SAMPLINGS, 4) == replayed
    assert launching.num_replayed == 0
    stepped = SteppedExecutor(launching.model, replace(launching.caps, max_in_flight=1))
    assert served(stepped, config, PROMPTS, SAMPLINGS, 4) == replayed
    launching.close()


def test_an_error_of_the_device_ends_its_steps_requests_and_the_engine(stubbed):
    make, interpreted = stubbed
    executor, config = make(device_graphs=True)
    engine = Engine(executor, config)
    engine.add_request(Request(request_id=0, prompt_token_ids=(1, 5, 6), max_tokens=4, sampling=SAMPLINGS[0]))
    interpreted.fail_after(20)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run_out(engine)
    assert engine.stats.finished == {FinishReason.ERROR: 1}
    interpreted.fail_after(-1)
    engine.close()


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
