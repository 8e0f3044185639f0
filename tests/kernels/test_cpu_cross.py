"""Kernels of the generic level give the same bits on aarch64, which is emulated, as here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmc.kernels.levels import GENERIC, NUMERIC_FLAGS

HERE = Path(__file__).parent
HEADERS = HERE.parents[1] / "kernels" / "cpu"
TOOLS = ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.pure,
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed"),
]


def test_aarch64_gives_the_bits_of_this_machine(tmp_path):
    printed = []
    for compiler, runner in (("g++", ()), ("aarch64-linux-gnu-g++", ("qemu-aarch64-static",))):
        program = tmp_path / compiler
        flags = ["-O1", "-static", "-pthread", "-Wno-psabi", *NUMERIC_FLAGS, *GENERIC.flags]
        command = [compiler, *flags, f"-I{HEADERS}", str(HERE / "cross_check.cpp"), "-o", str(program)]
        subprocess.run(command, check=True)
        done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True)
        printed.append(done.stdout.splitlines())
    assert len(printed[0]) == 6
    assert printed[0] == printed[1]
