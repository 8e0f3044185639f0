"""The CUDA executor of an artifact over the stub driver: everything of it but the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.artifact.schema import PROGRAM
from llmc.codegen.cuda.dry_walk import needs_of
from llmc.ir.document import decode_program
from llmc.runtime.executors.cuda import Machine, make_executor
from llmc.runtime.executors.cuda_device import Device
from llmc.runtime.executors.cuda_driver import CudaDriver
from llmc.runtime.executors.cuda_graphs import record
from llmc.runtime.executors.cuda_kernels import CudaKernels


def specialisations_of(artifact):
    """What was compiled, by key, found again from the artifact's own program."""
    manifest = artifact.manifest
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
        history=manifest.history,
    )
    needs = needs_of(program, weights)
    assert needs.arenas == unit.arenas
    return {each.key: each for each in needs.kernels}


def stubbed_executor(artifact, library, interpreted, config, free_bytes=1 << 30):
    """An executor whose launches reach the stub `library`, and are carried out by `interpreted`."""
    device, driver = Device("cpu"), CudaDriver(str(library))
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    kernels = CudaKernels(artifact, unit, (9, 0), driver, lambda: device.stream)
    interpreted.know(kernels)
    machine = Machine(
        device=device,
        launcher=kernels,
        recorder=lambda work: record(driver, device.stream, interpreted.enqueued(work)),
        free_bytes=free_bytes,
        details={},
        pack=kernels.pack,
    )
    return make_executor(artifact, config, machine)
