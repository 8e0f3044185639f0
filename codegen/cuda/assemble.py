"""Kernels to machine code: each specialisation for each architecture, in processes of their own. Needs
triton, no GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context

from ...kernels.cuda.launch import Specialisation
from ...spec.errors import TargetError


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A compiled specialisation. `stack_bytes` above 0 means that registers spill; `ptx` is what a newer
    GPU's driver can compile again."""

    cubin: bytes
    ptx: bytes
    name: str
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int


def require_triton() -> None:
    """Raises TargetError where triton is not installed."""
    if find_spec("triton") is None:
        raise TargetError(
            "cuda.no_triton",
            "Kernels for NVIDIA GPUs cannot be compiled here.",
            "The library triton, whose compiler makes them, is not installed.",
            "Install it with `pip install 'llmc-compiler[cuda]'`; no GPU is needed to compile.",
        )


def assemble(wanted: Sequence[tuple[Specialisation, str]]) -> list[Machine]:
    """Machine code for each (specialisation, architecture such as `sm_90`), in order.

    The same inputs give the same bytes, whichever process made them. Raises TargetError where triton is
    missing and InternalError where it refuses a kernel.
    """
    require_triton()
    with _workers() as pool:
        from .worker import compile_one

        return list(pool.map(compile_one, wanted))


@contextmanager
def _workers() -> Generator[ProcessPoolExecutor]:
    """Fresh processes: triton reads its settings when it is imported, and keeps a cache in a folder of its
    own."""
    count = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="llmc-triton-") as folder:
        context = get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare, initargs=(folder,)) as pool:
            yield pool


def _prepare(folder: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # Line information would put absolute paths into the files, and make them three times as large.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_CACHE_DIR"] = folder
