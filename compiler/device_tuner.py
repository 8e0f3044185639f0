"""Variants of products timed on the GPU of this machine: kernels compiled for it, each run between two events
with a cold cache."""

# pyright: basic

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..codegen.cuda.assemble import assemble, kernel_of
from ..codegen.cuda.tuning import Measured, Site, measure
from ..ir.weights import WeightStore
from ..kernels.cuda.launch import Launch, Specialisation
from ..kernels.cuda.variant_table import Choices

if TYPE_CHECKING:
    from ..runtime.executors.cuda_device import Device
    from ..runtime.executors.cuda_driver import CudaDriver, Function

_DEVICE = "cuda:0"
# More than any cache of a GPU holds.
_FLUSHED_BYTES = 256 << 20
_REPEATS = 15


class DeviceKernels:
    """A launcher of kernels that were compiled for this GPU by `prepare`, through the path of an artifact."""

    def __init__(self, device: Device, driver: CudaDriver, architecture: str) -> None:
        self._device, self._driver, self._architecture = device, driver, architecture
        self._functions: dict[Specialisation, Function] = {}

    def prepare(self, wanted: Sequence[Specialisation]) -> None:
        """Compile what is not there yet, over all cores."""
        from ..runtime.executors.cuda_kernels import load_kernel

        missing = [each for each in dict.fromkeys(wanted) if each not in self._functions]
        made = assemble([(each, self._architecture) for each in missing])
        for each, machine in zip(missing, made, strict=True):
            kernel = kernel_of(each, self._architecture, machine)
            self._functions[each] = load_kernel(self._driver, kernel, machine.cubin)

    def __call__(self, launch: Launch) -> None:
        from ..runtime.executors.cuda_kernels import parameter_value

        each = launch.specialisation
        values = [parameter_value(name, kind, launch.values[name]) for name, kind in each.parameters]
        self._driver.launch(self._functions[each], launch.grid, self._device.stream, values)


def measure_on_device(sites: Sequence[Site], weights: WeightStore) -> tuple[list[Measured], str]:
    """`codegen.cuda.tuning.measure` on the first GPU, and its name."""
    from ..runtime.executors.cuda_device import Device
    from ..runtime.executors.cuda_driver import CudaDriver

    torch.zeros(1, device=_DEVICE)  # makes torch's context the current one
    device, driver = Device(_DEVICE), CudaDriver()
    major, minor = torch.cuda.get_device_capability(_DEVICE)
    architecture = f"sm_{10 * major + minor}"
    kernels = DeviceKernels(device, driver, architecture)
    kept: dict[str, torch.Tensor] = {}

    def weight(name: str) -> torch.Tensor:
        if name not in kept:
            kept[name] = weights.evaluate(name).to(_DEVICE)
        return kept[name]

    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=_DEVICE)

    def timer(work: Callable[[], object]) -> float:
        samples: list[float] = []
        for _ in range(_REPEATS):
            flushed.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop) / 1000)
        return statistics.median(samples)

    with device.scope():
        found = measure(sites, weight, kernels, timer, kernels.prepare, choose=Choices(architecture))
    return found, torch.cuda.get_device_name(_DEVICE)
