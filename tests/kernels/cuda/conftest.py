"""Triton kernels without a GPU: the operators, run by the corrected interpreter."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def operators():
    """`CudaOperators` whose launches triton interprets on CPU tensors."""
    pytest.importorskip("triton")
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit
    from llmc.kernels.cuda.operators import CudaOperators

    correct_interpreter()
    return CudaOperators(launch_jit)
