"""Plan memory: weights as stored, an arena for activations, cache bytes per token.

    a = …; b = f(a); c = g(b)           →    a and c at offset 0, b behind them: a is dead when c is made

The graph stays as it is; `program.memory` is set. What an operator uses inside is its backend's to add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Program
from ..spec.arena import arena_bytes, live_bytes, place
from ..spec.cache import CacheLayout
from ..spec.history import Decision
from ..spec.plans import MemoryPlan
from .base import (
    PAGED,
    PLANNED,
    Contract,
    Exact,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
)
from .liveness import buffers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMemory:
    """Say what the program will need before anything is loaded."""

    name: ClassVar[str] = "memory_plan"
    stage: ClassVar[Stage] = Stage.plan
    requires: ClassVar[frozenset[str]] = frozenset({PAGED})
    provides: ClassVar[frozenset[str]] = frozenset({PLANNED})
    contract: ClassVar[Contract] = Exact()

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per value placed in the arena."""
        assert program.cache is not None
        buffers = buffers_of(program, step_sizes(program.cache, context))
        slots = place(buffers)
        plan = MemoryPlan(
            weight_bytes=sum(program.weights.num_bytes(name) for name in program.used_weights()),
            activation_bytes=arena_bytes(slots),
            activation_bytes_unshared=sum(buffer.size_bytes for buffer in buffers),
            max_tokens=context.max_tokens,
            max_rows=context.max_rows,
            cache_bytes_per_token=program.cache.bytes_per_token,
            arena=slots,
        )
        decision = Decision(
            subject="activations",
            choice=f"{plan.activation_bytes} bytes for {context.max_tokens} tokens a step",
            reason=f"{plan.activation_bytes_unshared} without reuse; "
            f"{live_bytes(buffers)} live at once and cannot be fewer",
        )
        report = PassReport(matches=len(slots), decisions=(decision,))
        return PassResult(program=program.replace(memory=plan), report=report)


def step_sizes(layout: CacheLayout, context: PassContext) -> dict[str, int]:
    """The symbols of a paged program in the largest step: all tokens, all rows, the longest block tables."""
    rows = min(context.max_rows, context.max_tokens)
    sizes = {"T": context.max_tokens, "L": rows, "S": rows, "Q": rows + 1}
    for index, group in enumerate(layout.groups):
        sizes[f"B{index}"] = group.pages_for(context.max_model_len)
        sizes[f"P{index}"] = 1  # the cache is planned by the token, not here
    return sizes
