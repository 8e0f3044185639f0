"""A GPU for measurements: launches of ahead-of-time compiled kernels, and times of replayed graphs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch

from llmc.codegen.cuda.assemble import Machine
from llmc.kernels.cuda.launch import Launch

DEVICE = "cuda:0"


def architecture() -> str:
    """The device's own, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return f"sm_{major * 10 + minor}"


class CompiledOnDemand:
    """A launcher that takes every kernel through the path of an artifact: compiled ahead of its first launch,
    loaded from its bytes by the driver. Compiles in this process, so that nothing but the device is
    measured."""

    def __init__(self) -> None:
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        torch.zeros(1, device=DEVICE)
        from llmc.artifact.cuda import CudaKernel
        from llmc.runtime.executors import cuda_driver, cuda_kernels

        self.driver = cuda_driver.CudaDriver()
        self.stream = lambda: torch.cuda.current_stream(DEVICE).cuda_stream
        self._load, self._parameter = cuda_kernels.load_kernel, cuda_kernels.parameter_value
        self._kernel_type = CudaKernel
        self._functions: dict = {}
        self.machines: dict[str, Machine] = {}

    def __call__(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        specialisation = launch.specialisation
        if specialisation not in self._functions:
            self._functions[specialisation] = self._compile(specialisation)
        values = [
            self._parameter(name, kind, launch.values[name]) for name, kind in specialisation.parameters
        ]
        self.driver.launch(self._functions[specialisation], launch.grid, self.stream(), values)

    def _compile(self, specialisation):
        from llmc.codegen.cuda.worker import compile_one

        machine = compile_one((specialisation, architecture()))
        self.machines[specialisation.key] = machine
        kernel = self._kernel_type(
            key=specialisation.key,
            architecture=architecture(),
            file="",
            name=machine.name,
            parameters=specialisation.parameters,
            warps=machine.warps,
            shared_bytes=machine.shared_bytes,
            registers=machine.registers,
            stack_bytes=machine.stack_bytes,
            toolkit=machine.toolkit,
        )
        return self._load(self.driver, kernel, machine.cubin)


class OnDevice:
    """Operators on CPU tensors: arguments go to the device and what the operator changed comes back."""

    def __init__(self, operators) -> None:
        self._operators = operators

    def __getattr__(self, name: str):
        operator = getattr(self._operators, name)

        def run(*arguments):
            moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = operator(*moved)
            for before, after in zip(arguments, moved, strict=True):
                if isinstance(before, torch.Tensor):
                    before.copy_(after)
            if isinstance(result, tuple):
                return tuple(None if part is None else part.cpu() for part in result)
            return result.cpu()

        return run


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after a run that loads whatever it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int = 20, rounds: int = 7) -> float:
    """Median seconds of one replay, several enqueued at a time."""
    graph.replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1000 / repeats)
    return statistics.median(samples)


def seconds_of(work: Callable[[], object], **counts: int) -> float:
    """Median seconds of `work` as a graph."""
    return replay_seconds(captured(work), **counts)
