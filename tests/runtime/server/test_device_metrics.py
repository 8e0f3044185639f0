"""What NVIDIA's management library says becomes metrics, and its absence an error that names the package."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from llmc.runtime.server.device_metrics import DeviceCollector, nvml_reader, watch_devices
from llmc.spec.errors import TargetError

pytestmark = pytest.mark.pure


class Broken(Exception):
    pass


def library(memory=(), error=None):
    """A stand-in with the functions that are used."""

    def start():
        if error is not None:
            raise Broken(error)

    return SimpleNamespace(
        NVMLError=Broken,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(memory),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=memory[index], total=100),
        nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=25 * (index + 1)),
    )


def test_every_gpu_is_a_sample_of_each_metric(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", library((40, 60)))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DeviceCollector(nvml_reader()))
    text = generate_latest(registry).decode()
    assert 'llmc:device_memory_used_bytes{device="1"} 60.0' in text
    assert 'llmc:device_memory_total_bytes{device="0"} 100.0' in text
    assert 'llmc:device_utilization_perc{device="1"} 0.5' in text


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(TargetError, match="pip install nvidia-ml-py"):
        nvml_reader()
    monkeypatch.setitem(sys.modules, "pynvml", library(error="Driver Not Loaded"))
    with pytest.raises(TargetError, match="says: Driver Not Loaded"):
        nvml_reader()


def test_only_engines_on_gpus_have_them(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", library((40,)))
    for executors, expected in (({"cpu"}, False), ({"cpu", "cuda"}, True)):
        registry = CollectorRegistry(auto_describe=False)
        watch_devices(registry, executors)
        assert ("device_memory" in generate_latest(registry).decode()) is expected
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch_devices(CollectorRegistry(), {"cuda"})
    assert "nvidia-ml-py is not installed" in caplog.text
