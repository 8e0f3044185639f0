"""Triton kernels without a GPU: the operators, run by the corrected interpreter. On one,
LLMC_TEST_DEVICE=cuda runs them as artifacts do: compiled ahead of time, loaded by the driver."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def operators():
    """`CudaOperators` on CPU tensors."""
    pytest.importorskip("triton")
    from llmc.kernels.cuda.operators import CudaOperators

    if os.environ.get("LLMC_TEST_DEVICE") == "cuda":
        sys.path.insert(0, str(Path(__file__).parents[3] / "bench" / "cuda"))
        from device import CompiledOnDemand, OnDevice

        return OnDevice(CudaOperators(CompiledOnDemand()))
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit

    correct_interpreter()
    return CudaOperators(launch_jit)
