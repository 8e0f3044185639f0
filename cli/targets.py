"""`llmc targets`: what code can be generated for."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..spec.target import KNOWN
from .output import Output, table, with_output

_ABOUT = {
    "cpu": "C++ compiled ahead of time for each ISA level; needs no torch to run",
    "cuda": "Triton kernels compiled ahead of time, on any machine; cuda:sm_90 for that architecture alone",
    "onnx": "graphs for ONNX Runtime GenAI and for llmc, with int4 and int8 weights",
    "reference": "PyTorch on the CPU; slow and obviously right, the oracle of all others",
}


@click.command()
@with_output
def targets(output: Output) -> None:
    """List the targets this version generates code for."""
    rows = [(name, target.device, _ABOUT.get(name, "")) for name, target in KNOWN.items()]
    data = {"targets": [{"name": name, **asdict(target)} for name, target in KNOWN.items()]}
    output.result(data, table(rows, ("target", "device", "what it is")))
