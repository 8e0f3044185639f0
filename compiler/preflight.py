"""What a compile and its artifact need of this machine, before any weight is loaded. Knows how to ask the
operating system for memory; arithmetic otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..artifact.folder import free_disk_bytes
from ..ir.program import Program
from ..passes.base import Pass
from ..passes.quantize.footprint import calibration_footprint
from ..passes.quantize.rounding import Tuning
from ..passes.quantize.tuned import learning_bytes
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


def check_calibration(
    fused: Program, passes: Sequence[Pass], num_tokens: int, stream_bytes: int, folder: Path, available: int
) -> None:
    """Raises TargetError with all numbers when calibrating `passes` on `num_tokens` tokens may take more
    memory than is `available`, or more disk than is free where `folder` is or will be. `fused` is the program
    before quantisation; of its activations each stream keeps `stream_bytes` in memory."""
    needed = calibration_footprint(fused, num_tokens, stream_bytes)
    _check_calibration_memory(
        num_tokens,
        needed.memory_bytes,
        available,
        "Close other programs, or choose a recipe that does not calibrate, such as --quant int4-fast.",
    )
    for pass_ in passes:
        tuning: Tuning | None = getattr(pass_, "tuning", None)
        if tuning is not None:
            _check_calibration_memory(
                num_tokens,
                learning_bytes(fused, tuning, num_tokens),
                available,
                f"Close other programs, or leave learning from the logits out: --set {pass_.name}.epochs=0.",
            )
    free = free_disk_bytes(folder)
    if needed.spilled_bytes > free:
        raise TargetError(
            "target.disk_space",
            f"Calibrating on {num_tokens} tokens spills up to {needed.spilled_bytes} bytes to disk.",
            f"Only {free} bytes are free at {str(folder.parent)!r}.",
            "Free some space, write to another place with -o, or give a shorter --calibration file.",
        )


def _check_calibration_memory(num_tokens: int, needed: int, available: int, fix: str) -> None:
    if _BASE_BYTES + needed > available:
        raise TargetError(
            "target.memory",
            f"Calibrating on {num_tokens} tokens needs up to {_BASE_BYTES + needed} bytes of memory.",
            f"{available} bytes are available on this machine.",
            fix,
        )


def check_memory(needed_bytes: int, available: int) -> None:
    """Raises TargetError with both numbers when less memory is available than needed."""
    if needed_bytes > available:
        raise TargetError(
            "target.memory",
            f"Compiling needs {needed_bytes} bytes of memory.",
            f"{available} bytes are available on this machine.",
            "Close other programs, or compile on a machine with more memory.",
        )
