"""Launches that stand ready in memory, as the driver takes them: their numbers are written in one go, and
each is one call. Knows no tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda_driver import CudaDriver, Function, LaunchAttribute, LaunchConfig, early_start

# The two scratch pointers that triton's kernels take behind their own parameters; both are null.
SCRATCH = 2

_FIELDS = [name for name, *_ in LaunchConfig._fields_]
_CONFIG = np.dtype(
    {
        "names": _FIELDS,
        "formats": [("u4", 3), ("u4", 3), "u4", "u8", "u8", "u4"],
        "offsets": [getattr(LaunchConfig, name).offset for name in _FIELDS],
        "itemsize": ctypes.sizeof(LaunchConfig),
    }
)

# What a launch is called with: its configuration, its function, the addresses of its parameters.
ReadyLaunch = tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class Ready:
    """A kernel that will be launched with so many parameters, the scratch pointers not counted; with
    `overlaps` before the launch ahead of it has ended."""

    function: Function
    num_parameters: int
    overlaps: bool


class LaunchTable:
    """Launches of `kernels`, in order.

    `values` has 8 bytes for each parameter and scratch pointer of each, in order, of which a kernel reads as
    many as the parameter has, lowest first. `grids` are uint32 `[launches, 3]`. Both may be written as soon
    as a launch was enqueued: the driver has copied what it needs.
    """

    def __init__(self, driver: CudaDriver, kernels: Sequence[Ready]) -> None:
        self._driver = driver
        counts = [kernel.num_parameters + SCRATCH for kernel in kernels]
        self.values: NDArray[np.uint64] = np.zeros(sum(counts), np.uint64)
        self._addresses = np.arange(len(self.values), dtype=np.uint64) * 8 + self.values.ctypes.data
        self._early: LaunchAttribute = early_start()
        self._configs = np.zeros(len(kernels), _CONFIG)
        self._configs["block"] = [(kernel.function.threads, 1, 1) for kernel in kernels]
        self._configs["shared_bytes"] = [kernel.function.shared_bytes for kernel in kernels]
        overlaps = np.asarray([kernel.overlaps for kernel in kernels], np.uint64)
        self._configs["attributes"] = overlaps * ctypes.addressof(self._early)
        self._configs["num_attributes"] = overlaps
        self.grids: NDArray[np.uint32] = self._configs["grid"]
        starts = np.cumsum([0, *counts])
        configs, addresses = self._configs.ctypes.data, self._addresses.ctypes.data
        self.launches: tuple[ReadyLaunch, ...] = tuple(
            (
                ctypes.c_void_p(configs + index * _CONFIG.itemsize),
                kernel.function.handle,
                ctypes.c_void_p(addresses + 8 * int(starts[index])),
            )
            for index, kernel in enumerate(kernels)
        )

    def go_to(self, stream: int) -> None:
        """Launches go to `stream` from now on."""
        self._configs["stream"] = stream

    def launch(self, launches: Sequence[ReadyLaunch]) -> None:
        """Enqueue some of `launches`. Raises as `CudaDriver.call` does."""
        function: Any = self._driver.launch_function
        for config, handle, addresses in launches:
            code = function(config, handle, addresses, None)
            if code:
                self._driver.check("cuLaunchKernelEx", code)
