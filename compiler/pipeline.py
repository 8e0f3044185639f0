"""The passes of one compile: which they are, what watches them, and the programs that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.infer import infer
from ..ir.program import Program
from ..passes.base import Pass, PassContext, PassReport, Stage
from ..passes.instruments import NumericContract, TextDump, Verification
from ..passes.manager import Instrument, check_order, run_passes, until_stage
from ..passes.probe import with_random_weights
from ..passes.recipes import recipe_for
from .cache.passes import CachedPasses
from .cache.session import CompileCache
from .ledger import Progress
from .request import CompileRequest
from .result import PassSummary
from .shrink import shrink
from .trace import trace_config

# Up to this size each pass is held to its numeric contract on the model itself; beyond it, where that
# would take minutes, on a small twin with random weights.
SMALL_MODEL_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The passes of a recipe with all options settled."""

    name: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One model at four stages: as traced with its weights bound, before the stage that quantises, before the
    lay-out stage, and final."""

    pipeline: Pipeline
    bound: Program
    fused: Program
    portable: Program
    final: Program
    passes: tuple[PassSummary, ...]


def choose_pipeline(request: CompileRequest) -> Pipeline:
    """The pipeline that `request` asks for. Raises RecipeError for an unknown preset, pass or option, and for
    passes that do not fit together."""
    recipe = recipe_for(request)
    return Pipeline(name=recipe.name, passes=recipe.passes)


def run_pipeline(
    pipeline: Pipeline,
    bound: Program,
    context: PassContext,
    request: CompileRequest,
    progress: Progress,
    cache: CompileCache,
) -> Compiled:
    """Run all passes on `bound` that `cache` does not know the result of, watched as `request.verify` says.
    Evaluates weights only for `numerics` on a small model, and never in a dry run."""
    watching: list[Instrument] = [_Announcement(progress, len(pipeline.passes))]
    numerics = request.verify == "numerics" and not request.dry_run and is_small(bound)
    if request.verify != "off":
        watching.append(Verification())
    if numerics:
        watching.append(NumericContract(seed=context.seed))
    if request.dump_ir is not None:
        watching.append(TextDump(request.dump_ir))
    quantised, back = until_stage(pipeline.passes, Stage.layout)
    front, quantisers = until_stage(quantised, Stage.quantise)
    check_order(pipeline.passes, bound.facts)
    # Dumps are of every pass as it runs, so none may be recalled.
    watched = None if request.dump_ir is not None else f"{request.verify}, numerics {numerics}"
    runner = CachedPasses(cache, bound, context, watched)
    fused = runner.run(bound, front, watching)
    portable = runner.run(fused, quantisers, watching)
    final = runner.run(portable, back, watching)
    infer(final)  # what was recalled carries no values
    return Compiled(
        pipeline=pipeline,
        bound=bound,
        fused=fused,
        portable=portable,
        final=final,
        passes=tuple(runner.outcomes),
    )


def check_on_twin(config: Any, pipeline: Pipeline, bound: Program, context: PassContext) -> None:
    """Hold each pass to its numeric contract on a shrunken twin of a model, one too large to do it on.

    Raises CheckFailed naming the pass that breaks its contract.
    """
    dtype: torch.dtype = getattr(torch, bound.spec.compute_dtype)
    program = trace_config(shrink(config), dtype=dtype, max_context=bound.spec.max_context)
    twin = with_random_weights(program, context.seed)
    instruments: Sequence[Instrument] = (Verification(), NumericContract(seed=context.seed))
    run_passes(twin, pipeline.passes, context, instruments)


def is_small(program: Program) -> bool:
    """Whether running the whole program a few times takes seconds."""
    return program.weights.total_bytes <= SMALL_MODEL_BYTES


class _Announcement:
    """Tells the progress which pass runs."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def before(self, pass_: Pass, program: Program) -> None:
        """Say its name."""
        self._progress.advance(self._done, self._total, pass_.name)

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> None:
        """Count it."""
        self._done += 1
