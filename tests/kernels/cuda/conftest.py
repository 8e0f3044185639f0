"""Triton kernels without a GPU: the operators, run by the corrected interpreter. On one,
LLMC_TEST_DEVICE=cuda runs them as artifacts do: compiled ahead of time, loaded by the driver."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def runs_on_device():
    return os.environ.get("LLMC_TEST_DEVICE") == "cuda"


@pytest.fixture(scope="session")
def launch():
    """A launcher for tensors of the tests' device."""
    pytest.importorskip("triton")
    if runs_on_device():
        sys.path.insert(0, str(Path(__file__).parents[3] / "bench" / "cuda"))
        from device import CompiledOnDemand

        return CompiledOnDemand()
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit

    correct_interpreter()
    return launch_jit


@pytest.fixture(scope="session")
def operators(launch):
    """`CudaOperators` on CPU tensors."""
    from llmc.kernels.cuda.operators import CudaOperators

    if runs_on_device():
        from device import OnDevice

        return OnDevice(CudaOperators(launch))
    return CudaOperators(launch)
