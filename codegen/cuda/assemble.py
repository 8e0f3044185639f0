"""Kernels to machine code: each specialisation for each architecture, in processes of their own. Needs
triton, no GPU."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import msgspec

from ...artifact.cuda import CudaKernel
from ...kernels.cuda.launch import Specialisation
from ...spec.errors import TargetError
from ..base import RecallBytes, compute_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A compiled specialisation. `stack_bytes` above 0 means that registers spill; `stages` are the loads
    ahead that shared memory holds, `ptx` is what a newer GPU's driver can compile again, `toolkit` the
    version of CUDA whose assembler was used; with `overlaps` it may be launched to begin before the launch
    ahead of it has ended."""

    cubin: bytes
    ptx: bytes
    name: str
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    stages: int
    toolkit: str
    overlaps: bool = False


def kernel_of(
    specialisation: Specialisation, architecture: str, machine: Machine, file: str = "", ptx: str = ""
) -> CudaKernel:
    """What a launch must know of a compiled specialisation; `file` and `ptx` name where its code is kept."""
    return CudaKernel(
        key=specialisation.key,
        architecture=architecture,
        file=file,
        name=machine.name,
        parameters=specialisation.parameters,
        warps=machine.warps,
        shared_bytes=machine.shared_bytes,
        registers=machine.registers,
        stack_bytes=machine.stack_bytes,
        toolkit=machine.toolkit,
        ptx=ptx,
        overlaps=machine.overlaps,
    )


def require_triton() -> None:
    """Raises TargetError where triton is not installed."""
    if find_spec("triton") is None:
        raise TargetError(
            "cuda.no_triton",
            "Kernels for NVIDIA GPUs cannot be compiled here.",
            "The library triton, whose compiler makes them, is not installed.",
            "Install it with `pip install 'llmc-compiler[cuda]'`; no GPU is needed to compile.",
        )


def assemble(
    wanted: Sequence[tuple[Specialisation, str]], recall: RecallBytes = compute_bytes
) -> list[Machine]:
    """Machine code for each (specialisation, architecture such as `sm_90`), in order; what `recall` remembers
    is not compiled again.

    The same inputs give the same bytes, whichever process made them. Raises TargetError where triton is
    missing and InternalError where it refuses a kernel.
    """
    require_triton()
    compiler = (version("triton"), kernel_digest())
    with _workers() as pool, ThreadPoolExecutor(2 * _num_workers()) as waiting:
        from .worker import compile_one

        def made(each: tuple[Specialisation, str]) -> Machine:
            specialisation, architecture = each

            def compute() -> bytes:
                return msgspec.msgpack.encode(pool.submit(compile_one, each).result())

            label = f"{specialisation.kernel} for {architecture}"
            data = recall((*compiler, specialisation.key, architecture), label, compute)
            return msgspec.msgpack.decode(data, type=Machine)

        return list(waiting.map(made, wanted))


def kernel_digest() -> str:
    """The SHA-256 of everything that a kernel's machine code is made from but its specialisation."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(__file__).parents[2] / "kernels" / "cuda"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _num_workers() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _workers() -> Generator[ProcessPoolExecutor]:
    """Fresh processes: triton reads its settings when it is imported, and keeps a cache in a folder of its
    own."""
    with tempfile.TemporaryDirectory(prefix="llmc-triton-") as folder:
        context = get_context("spawn")
        with ProcessPoolExecutor(
            _num_workers(), mp_context=context, initializer=_prepare, initargs=(folder,)
        ) as pool:
            yield pool


def _prepare(folder: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # Line information would put absolute paths into the files, and make them three times as large.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_CACHE_DIR"] = folder
