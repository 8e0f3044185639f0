"""What a compile and its artifact need of this machine, before any weight is loaded. Knows how to ask the
operating system for memory; arithmetic otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir.program import Program
from ..spec.errors import InternalError, TargetError

_BASE_BYTES = 1 << 30
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether an artifact can run in `memory_bytes`, and how much at a time: `cache_tokens` tokens over all
    requests, which is `requests` of `tokens_per_request` each (0 when not even one fits)."""

    fits: bool
    memory_bytes: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes_per_token: int
    cache_tokens: int
    requests: int
    tokens_per_request: int

    def sentence(self) -> str:
        """The same in words."""
        if not self.fits:
            need = self.weight_bytes + self.activation_bytes
            return f"does not fit: weights and activations take {need} of {self.memory_bytes} bytes"
        if self.requests:
            return f"fits: {self.requests} requests x {self.tokens_per_request} tokens at a time"
        return f"fits, with {self.cache_tokens} tokens of cache: less than one full context"


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
    tokens = plan.cache_tokens_within(memory_bytes)
    length = program.spec.max_context
    return Fit(
        fits=tokens > 0,
        memory_bytes=memory_bytes,
        weight_bytes=plan.weight_bytes,
        activation_bytes=plan.activation_bytes,
        cache_bytes_per_token=plan.cache_bytes_per_token,
        cache_tokens=tokens,
        requests=tokens // length,
        tokens_per_request=length,
    )


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
