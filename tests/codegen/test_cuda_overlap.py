"""Launches that may begin before the one ahead has ended: where it was asked for, of kernels that wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.kernels.cuda.launch import launch_of

pytest.importorskip("triton")


def stored_launch(kernel, monkeypatch):
    """A launch of a stored kernel, on memory that nobody reads."""
    values = {"a_ptr": torch.zeros(8)}
    launch = launch_of("embedding.embedding", (1,), values, {})
    known = launch.specialisation
    monkeypatch.setattr(type(known), "key", property(lambda self: kernel.key))
    own = {name: torch.zeros(8) if kind.startswith("*") else 1 for name, kind in kernel.parameters}
    return replace(launch, values=own)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_a_launch_begins_early_where_its_kernel_waits(cuda_artifact, cuda_stub, monkeypatch, asked, waits):
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_kernels import CudaKernels

    library, log = cuda_stub
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    kernel = next(each for each in unit.kernels if each.overlaps == waits)
    driver = CudaDriver(str(library))
    kernels = CudaKernels(cuda_artifact, unit, (9, 0), driver, lambda: 0, overlaps=asked)
    log.write_text("")
    kernels(stored_launch(kernel, monkeypatch))
    lines = log.read_text().splitlines()
    assert lines[-1].startswith(f"launch {kernel.name} ")
    assert lines[:-1] == ([f"early {kernel.name}"] if asked and waits else [])


def test_products_norms_and_attention_wait(cuda_artifact):
    unit = decode_unit(cuda_artifact.read_bytes(CUDA_UNIT))
    waiting = {each.name for each in unit.kernels if each.overlaps}
    others = {each.name for each in unit.kernels if not each.overlaps}
    assert {"linear_words", "linear_bytes", "rope_kv_write", "decode_splits", "merge_splits"} <= waiting
    assert not waiting & others
