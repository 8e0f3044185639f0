"""What the memory of an NVIDIA GPU gives at most, by NVIDIA's management library, which is optional."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def device_bandwidth() -> float | None:
    """Bytes per second of the first GPU's memory at its highest clock, two bits a line and cycle; None where
    the library nvidia-ml-py or the driver cannot say."""
    try:
        nvml: Any = import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock_mhz = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        lines = nvml.nvmlDeviceGetMemoryBusWidth(handle)
    except nvml.NVMLError:
        return None
    return 2 * clock_mhz * 1e6 * lines / 8
