"""Plan which steps are recorded as graphs, so that a step is one call and not hundreds.

    T = S = L = 1, 2, 4, 8, 16, 24, …    →    program.capture: 1, 2, 4, 8, 16, …, of these 1, 2, 4 at load

The graph stays as it is; `program.capture` is set. Where a step's tensors lie is planned when code is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Program
from ..spec.cache import CacheLayout
from ..spec.history import Decision
from ..spec.plans import CapturePlan
from .base import (
    PAGED,
    Contract,
    Exact,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
    option,
)

_SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
# Above these, tiles are full and finer steps buy little: TensorRT-LLM measured doubling to waste up to half.
_LARGE_STEP = 64
# Kernels of opening, sampling and settling a step, 12 of them only where top_k or top_p occur.
_OWN_LAUNCHES = 17
# What a product takes along is no launch of its own; attention in splits has a second, which merges them.
_TAKEN_ALONG = (
    "llmc.rms_norm.default",
    "llmc.add_rms_norm.default",
    "llmc.gated_activation_packed.default",
)
_ATTENTION = "llmc.paged_attention.default"
# From one launch to the next while recording, as operators are computed in Python, and for the driver to make
# it a node.
_RECORD_S = 60e-6
# The same where a list of a step's launches stands ready, and what its numbers take to be found.
_LAUNCH_S = 6e-6
# Of keys and values that the tokens of one sequence read one after the other, which are in the GPU's cache
# after the first: what the slowest GPU (A100) reads from its memory.
_READ_AGAIN_BYTES_S = 2e12


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaGraph:
    """Say for how many tokens steps are recorded and replayed (`cuda`)."""

    name: ClassVar[str] = "cuda_graph"
    stage: ClassVar[Stage] = Stage.plan
    requires: ClassVar[frozenset[str]] = frozenset({PAGED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Exact()

    max_rows: int = option(
        256,
        "The most tokens of a recorded step; larger steps are launched kernel by kernel.",
        low=1,
        high=1024,
    )
    load_seconds: float = option(
        1.0, "What recording may take while loading; other sizes when first wanted.", low=0.0, high=60.0
    )
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per number of tokens."""
        if context.target.kind != "cuda":
            return PassResult(program=program, report=PassReport(misses=(f"target {context.target.name}",)))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        own = sum(target.startswith("llmc.") and target not in _TAKEN_ALONG for target in targets)
        launches = _OWN_LAUNCHES + own + targets.count(_ATTENTION)
        rows = batch_sizes(self.max_rows)
        fitting = int(self.load_seconds / (launches * _RECORD_S))
        at_load = rows[:fitting]
        plan = CapturePlan(
            decode_rows=rows,
            at_load=at_load,
            num_launches=launches,
            seconds=round(len(at_load) * launches * _RECORD_S, 3),
            load_seconds=self.load_seconds,
            keys_read_again=keys_read_again(launches, program.cache),
        )
        decision = Decision(
            subject="steps",
            choice=f"recorded for {', '.join(map(str, rows))} tokens, {len(at_load)} of them at load",
            reason=f"about {launches} launches a step; recording {len(at_load)} takes about "
            f"{plan.seconds:g} s of {self.load_seconds:g}; launching a step takes as long as reading "
            f"{plan.keys_read_again} cached tokens again",
        )
        return PassResult(
            program=program.replace(capture=plan),
            report=PassReport(matches=len(rows), decisions=(decision,)),
        )


def keys_read_again(launches: int, cache: CacheLayout | None) -> int:
    """How many cached tokens are read in the time that launching a step takes: where tokens of a sequence
    that attend by themselves read more again, replaying them loses to launching."""
    return 0 if cache is None else int(launches * _LAUNCH_S * _READ_AGAIN_BYTES_S / cache.bytes_per_token)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Sizes that every step of up to `most` tokens is filled up to: fine where a row costs, coarse above."""
    sizes = [size for size in _SMALL if size < most]
    sizes += range(_SMALL[-1] + _LARGE_STEP, most, _LARGE_STEP)
    return (*sizes, most)
