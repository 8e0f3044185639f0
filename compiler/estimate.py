"""What a model will need before it is compiled, from its config alone: one layer of each kind is traced at
full size and counted as often as the model has it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..codegen.base import backend_for
from ..ir.program import Program
from ..passes.base import Pass, PassContext, Stage
from ..passes.bits import num_parameters
from ..passes.instruments import Timing
from ..passes.manager import check_order, run_passes, until_stage
from ..passes.narrow_rows import NarrowRows
from ..runtime.fit import Fit, fit_within
from ..spec.cache import CacheLayout
from ..spec.errors import InternalError
from ..spec.plans import MemoryPlan
from ..spec.target import Target
from .folding import FoldedModel, fold_model
from .result import PassSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the artifact of a recipe will need: the memory plan and the cache layout that it will have.

    `plan.arena` is of the folded program. `passes` ran on that, too: their matches are those of one layer
    of each kind.
    """

    recipe: str
    num_parameters: int
    num_layers: int
    bits_per_weight: float
    max_context: int
    plan: MemoryPlan
    cache: CacheLayout
    passes: tuple[PassSummary, ...]

    def fit(self, memory_bytes: int, tokens: int) -> Fit:
        """What can be served in `memory_bytes`, in requests of `tokens` tokens."""
        return fit_within(self.plan, self.cache, tokens, memory_bytes)


class FileBytes(NamedTuple):
    """Bytes of an artifact: its tensors, exactly, and all files together, at most."""

    weights: int
    at_most: int


class _Ran(NamedTuple):
    """A folded program after some passes, and how they went."""

    program: Program
    passes: tuple[PassSummary, ...]


class Estimator:
    """Estimates for one model and target: traced once, passes run once for each recipe asked for."""

    def __init__(
        self,
        folder: Path,
        *,
        target: Target,
        dtype: torch.dtype | None = None,
        max_context: int | None = None,
    ) -> None:
        """Raises what `fold_model` raises."""
        self._folded: FoldedModel = fold_model(folder, dtype=dtype, max_context=max_context)
        self._target = target
        context = self._folded.program.spec.max_context
        self._context = PassContext(target=target, max_model_len=context, planning=True)
        self._known: dict[tuple[Pass, ...], _Ran] = {(): _Ran(self._folded.program, ())}

    def estimate(self, recipe: str, passes: Sequence[Pass]) -> Estimate:
        """The estimate for a recipe by its passes. Raises what they raise, InternalError where they plan
        neither cache nor memory."""
        final, summaries = self._run(self._counted(passes))
        if final.cache is None or final.memory is None:
            raise InternalError(
                "compile.no_memory_plan",
                "The program has no memory plan.",
                "The recipe ran without the passes that make one.",
                "Add `kv_layout`, `paged_attention` and `memory_plan` to the end of the recipe.",
            )
        total = self._folded.total
        used = list(final.used_weights())
        weight_bytes = total({name: final.weights.num_bytes(name) for name in used})
        stand_for = total({name: num_parameters(final.weights[name]) for name in used})
        cache = self._folded.unfolded(final.cache)
        plan = replace(final.memory, weight_bytes=weight_bytes, cache_bytes_per_token=cache.bytes_per_token)
        return Estimate(
            recipe=recipe,
            num_parameters=self._folded.num_parameters,
            num_layers=self._folded.num_layers,
            bits_per_weight=8 * weight_bytes / max(1, stand_for),
            max_context=final.spec.max_context,
            plan=plan,
            cache=cache,
            passes=summaries,
        )

    def file_bytes(self, passes: Sequence[Pass]) -> FileBytes:
        """Bytes of the artifact of a recipe. Raises TargetError for what the target has no form for."""
        counted = self._counted(passes)
        front, _ = until_stage(counted, Stage.layout)
        final, portable = self._run(counted).program, self._run(front).program
        backend = backend_for(self._target)
        bound = backend.estimate_bytes(final, portable)
        stored = backend.stored_form(final, portable)
        weights = self._folded.total({name: stored.num_bytes(name) for name in stored})
        return FileBytes(weights=weights, at_most=weights + bound - stored.total_bytes)

    def _counted(self, passes: Sequence[Pass]) -> tuple[Pass, ...]:
        """`passes` but for the one that only the last layer gains by: where layers stand for others, what is
        alive at once is decided by those, one behind the other."""
        alone = all(len(layers) == 1 for layers in self._folded.members)
        return tuple(pass_ for pass_ in passes if alone or pass_.name != NarrowRows.name)

    def _run(self, passes: tuple[Pass, ...]) -> _Ran:
        """The folded program after `passes`; what recipes begin with alike is run once."""
        if passes in self._known:
            return self._known[passes]
        check_order(passes, self._folded.program.facts)
        front = _beginning(passes)
        before = self._run(front)
        timing = Timing(time.perf_counter)
        with torch.no_grad():
            program = run_passes(before.program, passes[len(front) :], self._context, (timing,))
        ran = tuple(
            PassSummary(name=entry.name, seconds=entry.seconds, matches=entry.matches)
            for entry in timing.times
        )
        self._known[passes] = _Ran(program, (*before.passes, *ran))
        return self._known[passes]


def _beginning(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """What other recipes are likely to share with `passes`: all before the last of quantising and lay-out
    that there is something of."""
    for stage in (Stage.layout, Stage.quantise):
        if passes[-1].stage >= stage:
            front, _ = until_stage(passes, stage)
            return front
    return ()
