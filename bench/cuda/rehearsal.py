"""Every part of the bench on a machine without a GPU, on tiny shapes: kernels are interpreted, graphs
recorded in Python, the driver is a stub. Its numbers mean nothing; that it ends means that nothing but the
device can stop a run on one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

from tree import REPOSITORY


class Rehearsed:
    """A launcher that interprets, in place of `device.CompiledOnDemand`; it has no lists."""

    pack = None

    def __init__(self) -> None:
        from llmc.kernels.cuda.interpreter import correct_interpreter
        from llmc.kernels.cuda.jit import launch_jit

        correct_interpreter()
        self._launch = launch_jit
        self._recorded: list[Callable[[], object]] | None = None
        self.overlaps = False

    def __call__(self, launch) -> None:
        if self._recorded is None:
            self._launch(launch)
        else:
            self._recorded.append(lambda: self._launch(launch))

    def prepare(self, specialisations) -> None:
        """Nothing is compiled."""

    def recorder(self, device):
        """As `CompiledOnDemand.recorder`."""
        from stub_device import Enqueued

        def record(work: Callable[[], None]):
            self._recorded = []
            try:
                with Enqueued(self._recorded.append):
                    work()
            finally:
                recorded, self._recorded = self._recorded, None
            return Replayed(recorded)

        return record


class Replayed:
    """What was recorded, done again."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls = calls

    def replay(self) -> None:
        for call in self._calls:
            call()

    def close(self) -> None:
        """There is nothing to give back."""


def driver_path() -> dict:
    """A kernel compiled, loaded by the stub driver, launched, recorded and replayed: the way of
    `CompiledOnDemand`, but that nothing is computed."""
    import torch
    from device import CompiledOnDemand
    from stub_device import build_stub

    from llmc.codegen.cuda.assemble import assemble
    from llmc.kernels.cuda.operators import CudaOperators
    from llmc.runtime.executors.cuda_device import Device

    library, log = build_stub(tempfile.mkdtemp(prefix="llmc-stub-"))
    launcher = CompiledOnDemand(str(library), lambda wanted: assemble([wanted])[0])
    operators, table = CudaOperators(launcher), torch.ones(4, 64)
    launcher.overlaps = True

    def work() -> None:
        operators.embedding(torch.zeros(1, dtype=torch.int64), table)

    work()
    recorded = launcher.recorder(Device("cpu"))(work)
    recorded.replay()
    recorded.close()
    return {"driver_calls": len(log.read_text().splitlines())}


def rehearse() -> None:
    """Make the parts of this process work on the CPU, on shapes that an interpreter can take."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(REPOSITORY / "tests" / "codegen"))
    import device

    device.DEVICE = "cpu"
    import engines
    import graphs
    import int4_peer
    import limits
    import llama_cpp
    import peers
    import rates

    import models

    graphs.NODES = 2
    limits.COPIED_BYTES, limits.SIDE = 1 << 20, 64
    rates.MATRICES = {"qkv": (96, 128), "head": (70, 128)}
    rates.ROWS = (1, 64)
    rates.CONTEXTS = ((1, 80), (2, 16))
    rates.PAGE = 16
    models.VOCABULARY = 96
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 8}
    models.SHAPES = dict.fromkeys(models.SHAPES, tiny)
    models.STEPS, models.PREFILL = ((1, 20), (2, 9)), 12
    models.MAX_CONTEXT = 256
    engines.TOKENS, engines.SHORT, engines.LENGTHS = 2, 8, 1
    engines.RATES = ((1, 4), (2, 3))
    engines.CONFIG = {"max_requests": 2, "max_step_tokens": 32, "max_model_len": 64}
    peers.MIXED = {"requests": 2, "least": 2, "most": 4}
    peers.DECODE = ((1, 44), (2, 46))
    peers.COMPILED = {"backend": "eager"}  # traced as a whole, and no code is generated
    int4_peer.GROUP, int4_peer.INNER = 32, 2
    llama_cpp.PROMPT, llama_cpp.GENERATED = 8, 4


def loaded_by_stub(artifact) -> dict:
    """An artifact's cubins loaded by the stub driver, and a launched step of its executor, interpreted."""
    from stub_device import build_stub

    from llmc.artifact.cuda import CUDA_UNIT, decode_unit
    from llmc.runtime.config import RuntimeConfig
    from llmc.runtime.engine import Engine
    from llmc.runtime.executors.cuda import Machine, make_executor
    from llmc.runtime.executors.cuda_device import Device
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_kernels import CudaKernels
    from llmc.runtime.protocol import SamplingState
    from llmc.runtime.request import Request

    library, _ = build_stub(tempfile.mkdtemp(prefix="llmc-stub-"))
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    kernels = CudaKernels(artifact, unit, (9, 0), CudaDriver(str(library)), lambda: 0)
    machine = Machine(
        device=Device("cpu"), launcher=Rehearsed(), recorder=None, free_bytes=1 << 30, details={}
    )
    config = RuntimeConfig(max_requests=2, max_step_tokens=32, max_model_len=48)
    executor = make_executor(artifact, config, machine)
    engine = Engine(executor, config)
    engine.add_request(Request(request_id=0, prompt_token_ids=(1, 5), max_tokens=1, sampling=SamplingState()))
    tokens = 0
    while engine.has_work():
        tokens += sum(len(output.token_ids) for output in engine.step())
    executor.close()
    return {"kernels_loaded": len(kernels.functions), "tokens": tokens}
