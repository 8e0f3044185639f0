"""Starting from a CUDA artifact compiles nothing: in a process where triton cannot be imported and no program
can be started, its kernels are loaded, its steps recorded, and a step launched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_START = """
import json
import sys

sys.modules["triton"] = None  # importing it is an error
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork")
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in STARTS else None)

import torch

torch.Tensor.__repr__ = None  # a value that is read while a GPU records is an error there

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.artifact.reader import open_unchecked
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.executors.cuda import Machine, make_executor, open_model
from llmc.runtime.executors.cuda_device import Device
from llmc.runtime.executors.cuda_driver import CudaDriver
from llmc.runtime.executors.cuda_graphs import record
from llmc.runtime.executors.cuda_kernels import CudaKernels
from llmc.runtime.executors.tiles import SequencePart

artifact, device, driver = open_unchecked(sys.argv[1]), Device("cpu"), CudaDriver(sys.argv[2])
unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
kernels = CudaKernels(artifact, unit, (9, 0), driver, lambda: device.stream)
machine = Machine(
    device=device,
    launcher=kernels,
    recorder=lambda work: record(driver, device.stream, work),
    free_bytes=1 << 30,
    details={},
    pack=kernels.pack,
)
config = RuntimeConfig(max_requests=2, max_step_tokens=32, max_model_len=48)
executor = make_executor(artifact, config, machine)
part = SequencePart(start=0, token_ids=[1, 5, 9], block_tables=[[0]], wanted=[2])
executor.close()
list(open_model(artifact, machine, [2], 32).run([part]))
print(json.dumps({"kernels": len(kernels.functions), "started": started}))
"""


def test_no_compiler_is_needed_or_started(cuda_artifact, cuda_stub):
    library, log = cuda_stub
    log.write_text("")
    command = [sys.executable, "-c", _START, str(cuda_artifact.path), str(library)]
    environment = {"PATH": "", "LLMC_CUDA_STUB_LOG": str(log)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] > 20
    assert found["started"] == []
    # Recorded steps, and then one that was launched.
    assert log.read_text().count("launch ") > 20
