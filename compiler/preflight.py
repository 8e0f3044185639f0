"""What a compile and its artifact need of this machine, before any weight is loaded. Knows how to ask the
operating system for memory; arithmetic otherwise."""

from __future__ import annotations

import math

from ..ir.program import Program
from ..runtime.fit import Fit, fit_within
from ..spec.errors import InternalError, TargetError

_BASE_BYTES = 1 << 30
_FLOAT_BYTES = 4


def fit(program: Program, memory_bytes: int) -> Fit:
    """What of `program` (after its memory plan was made) can be served in `memory_bytes`."""
    plan = program.memory
    if plan is None:
        raise InternalError(
            "compile.no_memory_plan",
            "The program has no memory plan.",
            "The recipe ran without the pass that makes one.",
            "Add `memory_plan` to the end of the recipe.",
        )
    assert program.cache is not None
    return fit_within(plan, program.cache, program.spec.max_context, memory_bytes)


def compile_bytes(program: Program) -> int:
    """Bytes that compiling `program` takes at most: the libraries, and its largest weight as stored, in
    float32 while it is quantised, and as written."""
    largest = max((math.prod(program.weights[name].shape) for name in program.weights), default=0)
    return _BASE_BYTES + 3 * _FLOAT_BYTES * largest


def check_memory(needed_bytes: int, available: int) -> None:
    """Raises TargetError with both numbers when less memory is available than needed."""
    if needed_bytes > available:
        raise TargetError(
            "target.memory",
            f"Compiling needs {needed_bytes} bytes of memory.",
            f"{available} bytes are available on this machine.",
            "Close other programs, or compile on a machine with more memory.",
        )
