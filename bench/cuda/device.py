"""A GPU for measurements: launches of ahead-of-time compiled kernels, and times of replayed graphs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from llmc.codegen.cuda.assemble import Machine, assemble, kernel_of
from llmc.kernels.cuda.launch import Launch, Specialisation

# Where parts work; `rehearsal.rehearse` makes it the CPU before they are imported.
DEVICE = "cuda:0"


def architecture() -> str:
    """The device's own, such as sm_90, which is what a rehearsal compiles for."""
    if DEVICE == "cpu":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return f"sm_{major * 10 + minor}"


class CompiledOnDemand:
    """A launcher that takes every kernel through the path of an artifact: compiled ahead of its first launch,
    loaded from its bytes by the driver `library`. `compile_one` compiles, by default in this process."""

    def __init__(
        self,
        library: str = "libcuda.so.1",
        compile_one: Callable[[tuple[Specialisation, str]], Machine] | None = None,
    ) -> None:
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
        torch.zeros(1, device=DEVICE)
        from llmc.runtime.executors import cuda_driver, cuda_kernels, cuda_table

        self.driver = cuda_driver.CudaDriver(library)
        self.stream = current_stream
        self._compile_one = compile_one or _compile_here
        self._load, self._parameter = cuda_kernels.load_kernel, cuda_kernels.parameter_value
        self._table, self._ready = cuda_table.LaunchTable, cuda_table.Ready
        self._functions: dict = {}
        self.machines: dict[str, Machine] = {}
        # Whether kernels that can may begin before the launch ahead of them has ended.
        self.overlaps = False

    def __call__(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        specialisation = launch.specialisation
        function = self._function(specialisation)
        values = [
            self._parameter(name, kind, launch.values[name]) for name, kind in specialisation.parameters
        ]
        overlaps = self.overlaps and self.machines[specialisation.key].overlaps
        self.driver.launch(function, launch.grid, self.stream(), values, overlaps=overlaps)

    def prepare(self, specialisations: Sequence[Specialisation]) -> None:
        """Compile what is not there yet, over all cores, before anything is measured."""
        missing = [each for each in dict.fromkeys(specialisations) if each not in self._functions]
        made = assemble([(each, architecture()) for each in missing])
        for each, machine in zip(missing, made, strict=True):
            self._functions[each] = self._loaded(each, machine)

    def recorder(self, device):
        """Records what a call enqueues on `device`'s stream, to which launches go from now on."""
        from llmc.runtime.executors.cuda_graphs import record

        self.stream = lambda: device.stream
        return lambda work: record(self.driver, device.stream, work)

    def pack(self, specialisations: Sequence[Specialisation]):
        """Launches of these, ready, as `CudaKernels.pack` has them."""
        ready = [
            self._ready(
                self._function(each),
                len(each.parameters),
                self.overlaps and self.machines[each.key].overlaps,
            )
            for each in specialisations
        ]
        return self._table(self.driver, ready)

    def _function(self, specialisation: Specialisation):
        if specialisation not in self._functions:
            self._functions[specialisation] = self._compile(specialisation)
        return self._functions[specialisation]

    def _compile(self, specialisation: Specialisation):
        return self._loaded(specialisation, self._compile_one((specialisation, architecture())))

    def _loaded(self, specialisation: Specialisation, machine: Machine):
        self.machines[specialisation.key] = machine
        kernel = kernel_of(specialisation, architecture(), machine)
        return self._load(self.driver, kernel, machine.cubin)


def _compile_here(wanted: tuple[Specialisation, str]) -> Machine:
    from llmc.codegen.cuda.worker import compile_one

    return compile_one(wanted)


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


def current_stream() -> int:
    """The handle of torch's stream; the CPU has none."""
    return 0 if DEVICE == "cpu" else torch.cuda.current_stream(DEVICE).cuda_stream


def settled() -> None:
    """Waits for everything that was enqueued."""
    if DEVICE != "cpu":
        torch.cuda.synchronize(DEVICE)


def device_name() -> str:
    """What the driver calls it."""
    return "a rehearsal on the CPU" if DEVICE == "cpu" else torch.cuda.get_device_name(DEVICE)


class _Again:
    """Work that is done when it is replayed: what a rehearsal has for a graph."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph | _Again:
    """`work` as a graph, after a run that loads whatever it needs."""
    if DEVICE == "cpu":
        return _Again(work)
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


def replay_seconds(graph: torch.cuda.CUDAGraph | _Again, repeats: int = 20, rounds: int = 7) -> float:
    """Median seconds of one replay, several enqueued at a time; in a rehearsal, of one."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        graph.replay()
        return time.perf_counter() - began
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
