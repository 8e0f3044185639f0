"""The other kernel tests again, with libraries that watch every access and every shift."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.cpu, pytest.mark.slow]

HERE = Path(__file__).parent


def runtime_library(name):
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = done.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.mark.parametrize("file", ["linear", "rows", "attention", "sampling"])
def test_kernels_read_and_write_within_bounds(file):
    environment = {
        **os.environ,
        "LLMC_TEST_SANITIZERS": "address,undefined",
        "LD_PRELOAD": runtime_library("libasan.so"),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    ]
    done = subprocess.run(
        [*command, str(HERE / f"test_cpu_{file}.py"), "-k", "not forked"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_the_pool_races_nowhere():
    environment = {
        **os.environ,
        "LLMC_TEST_SANITIZERS": "thread",
        "LD_PRELOAD": runtime_library("libtsan.so"),
        "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    ]
    done = subprocess.run(
        [*command, str(HERE / "test_cpu_sampling.py"), "-k", "barrier or open_and_close"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
