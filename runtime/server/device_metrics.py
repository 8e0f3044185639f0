"""What NVIDIA's management library says of the GPUs, for whoever scrapes. The library is optional: without it
there are no such metrics, and the start of the server says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...spec.errors import TargetError
from .metric_table import PREFIX


class DeviceReading(NamedTuple):
    """One GPU now. `utilization` is the share of the last moments in which a kernel ran, 1 is all."""

    device: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization: float


ReadDevices = Callable[[], Sequence[DeviceReading]]


def nvml_reader() -> ReadDevices:
    """Reads all GPUs of this machine. Raises TargetError where the library or the driver is missing."""
    try:
        nvml: Any = import_module("pynvml")
    except ModuleNotFoundError as error:
        raise TargetError(
            "cuda.no_nvml",
            "The memory and utilisation of GPUs cannot be read.",
            "The library nvidia-ml-py is not installed.",
            "Install it with `pip install nvidia-ml-py`; everything else works without it.",
        ) from error
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise TargetError(
            "cuda.nvml",
            "The memory and utilisation of GPUs cannot be read.",
            f"NVIDIA's management library says: {error}.",
            "Check the driver with nvidia-smi; everything else works without it.",
        ) from error

    def read() -> list[DeviceReading]:
        readings: list[DeviceReading] = []
        for index, handle in enumerate(handles):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            busy = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            readings.append(DeviceReading(str(index), int(memory.used), int(memory.total), busy / 100))
        return readings

    return read


def watch_devices(registry: CollectorRegistry, executors: Iterable[str]) -> None:
    """Adds the GPUs' metrics where an engine runs on one; a warning where they cannot be read."""
    if "cuda" not in executors:
        return
    try:
        registry.register(DeviceCollector(nvml_reader()))
    except TargetError as missing:
        logging.getLogger("llmc.server").warning("%s %s %s", missing.what, missing.why, missing.fix)


class DeviceCollector(Collector):
    """Reads the GPUs when somebody scrapes."""

    def __init__(self, read: ReadDevices) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        families = {
            "memory_used_bytes": GaugeMetricFamily(
                PREFIX + "device_memory_used_bytes", "Memory of the GPU in use.", labels=("device",)
            ),
            "memory_total_bytes": GaugeMetricFamily(
                PREFIX + "device_memory_total_bytes", "Memory of the GPU.", labels=("device",)
            ),
            "utilization": GaugeMetricFamily(
                PREFIX + "device_utilization_perc",
                "Share of the last moments in which the GPU ran a kernel, 1 is all.",
                labels=("device",),
            ),
        }
        for reading in self._read():
            for name, family in families.items():
                family.add_metric((reading.device,), getattr(reading, name))
        yield from families.values()
