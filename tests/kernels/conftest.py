"""Test libraries of the CPU kernels: compiled from the .cpp files here, one for each level."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmc.kernels.levels import AVX512VNNI, NUMERIC_FLAGS, Level, supported_levels

HERE = Path(__file__).parent
HEADERS = HERE.parents[1] / "kernels" / "cpu"
CACHE = HERE.parents[1] / "build" / "kernel-tests"
# Set by test_cpu_sanitizers.py, which runs the other tests again under their run-time libraries.
SANITIZERS = os.environ.get("LLMC_TEST_SANITIZERS", "")
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def cpu_features():
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


LEVELS_HERE = supported_levels(cpu_features())
# Where there are no tile registers, the code around them runs on tiles in standard C++.
EMULATED_AMX = Level(
    name="amx-emulated",
    flags=(*AVX512VNNI.flags, "-DLLMC_AMX_EMULATED=1"),
    features=AVX512VNNI.features,
)
PRODUCT_LEVELS = (*LEVELS_HERE, EMULATED_AMX) if AVX512VNNI in LEVELS_HERE else LEVELS_HERE


def compile_harness(source, level, defines=(), extra=()):
    """The path of the library of `source` for `level`; rebuilt only when any of its inputs changed."""
    flags = ["-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-Wall", "-Werror"]
    flags += [
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        *NUMERIC_FLAGS,
        *level.flags,
        *(f"-D{one}" for one in defines),
        *extra,
    ]
    if SANITIZERS:
        flags[0] = "-O1"  # the generic level's unrolled code takes minutes otherwise
        flags += [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    texts = [path.read_bytes() for path in sorted(HEADERS.glob("*.hpp"))] + [(HERE / source).read_bytes()]
    key = hashlib.sha256(b"\0".join([*texts, " ".join(flags).encode()])).hexdigest()[:24]
    target = CACHE / f"{Path(source).stem}-{level.name}-{key}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, f"-I{HEADERS}", str(HERE / source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        partial.rename(target)
    return target


@pytest.fixture(scope="session")
def build():
    """`build(source, defines, levels)`: level name -> loaded library, for every level of this machine."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")

    def build_all(source, defines=(), levels=LEVELS_HERE):
        with ThreadPoolExecutor(2) as pool:
            paths = list(pool.map(lambda level: compile_harness(source, level, defines), levels))
        return {level.name: ctypes.CDLL(str(path)) for level, path in zip(levels, paths, strict=True)}

    return build_all


@pytest.fixture(scope="session")
def product_levels():
    """The levels that matrix products are built for: tiles run emulated."""
    return PRODUCT_LEVELS


@pytest.fixture(scope="session")
def compile_level():
    """`compile_level(source, level, defines)`: the path of the library, for levels that need not run here."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    return compile_harness


@pytest.fixture
def rng(request):
    """Fresh numbers on every run; the seed is part of a failing test's report."""
    seed = int.from_bytes(os.urandom(4), "little")
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
