"""One compile from start to end: which stage follows which. What a stage does its module knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..artifact.folder import check_disk_space, check_free_name
from ..artifact.schema import MANIFEST
from ..artifact.writer import ArtifactWriter
from ..codegen.base import backend_for, default_target
from ..ir.bands import one_thread
from ..ir.program import Program
from ..ir.weights import Reader, WeightStore
from ..passes.base import PassContext, needs_calibration
from ..passes.bits import bits_per_weight
from ..passes.calibration import MEMORY_BYTES
from ..runtime.memory import available_memory_bytes
from .bind import bind_checkpoint
from .cache.recall import recall_check, recall_trace
from .cache.session import CompileCache
from .calibrate import calibration_of
from .calibration import results_folder
from .checkpoint import Checkpoint, open_checkpoint, parse_dtype
from .dry_run import plan_compile
from .finish import finish_artifact, make_manifest
from .ledger import Ledger, Progress, Silent
from .pipeline import Compiled, Pipeline, check_on_twin, choose_pipeline, is_small, run_pipeline
from .preflight import check_calibration, check_memory, compile_bytes, fit
from .quality import Quality
from .request import CompileRequest
from .result import CompileResult
from .selfcheck import self_check
from .source import find_model
from .trace import trace_config


def compile_model(
    model: str | Path,
    *,
    output: str | Path | None = None,
    quant: str | None = None,
    target: str | None = None,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    kv_dtype: str | None = None,
    max_model_len: int | None = None,
    verify: str = "numerics",
    force: bool = False,
    dry_run: bool = False,
    dump_ir: str | Path | None = None,
    cache: bool = True,
    calibration: str | Path | None = None,
    max_kl: float | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> CompileResult:
    """Compile the Hugging Face folder (or cached hub id) `model` into an artifact.

    The arguments are those of `CompileRequest`. With `dry_run` everything is decided and nothing is
    loaded or written, which takes config.json alone. Raises LlmcError subclasses: UsageError and
    RecipeError for what was asked, ModelError for the model, TargetError for what this machine cannot do,
    CheckFailed when a check says no. However it ends, the output is whole or as it was before.
    """
    request = CompileRequest(
        model=str(model),
        output=None if output is None else Path(output),
        quant=quant,
        target=target or default_target(),
        recipe=None if recipe is None else Path(recipe),
        overrides=tuple(overrides),
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        verify=verify,
        force=force,
        dry_run=dry_run,
        dump_ir=None if dump_ir is None else Path(dump_ir),
        cache=cache,
        calibration=None if calibration is None else Path(calibration),
        max_kl=max_kl,
    )
    request.validate()
    if request.dry_run and request.dump_ir is None:
        return plan_compile(request, Ledger(clock, progress or Silent()))
    with CompileCache(request.cache_config(), clock) as known:
        return _compile(request, Ledger(clock, progress or Silent()), known)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """What is known before anything is traced."""

    checkpoint: Checkpoint
    pipeline: Pipeline
    dtype: torch.dtype


def _compile(request: CompileRequest, ledger: Ledger, cache: CompileCache) -> CompileResult:
    opened = _open(request, ledger)
    bound = _bind(request, opened, ledger, cache)
    planning = PassContext(target=request.parsed_target, max_model_len=bound.spec.max_context, planning=True)
    if request.dry_run:
        compiled = _run_passes(request, opened, bound, planning, ledger, cache)
        needed = backend_for(request.parsed_target).estimate_bytes(compiled.final, compiled.portable)
        return _result(request, compiled, ledger, cache, size_bytes=needed, quality=None)
    with results_folder(request.output_path()) as results:
        return _make(request, opened, bound, planning, results, ledger, cache)


def _make(
    request: CompileRequest,
    opened: _Opened,
    bound: Program,
    planning: PassContext,
    results: Path,
    ledger: Ledger,
    cache: CompileCache,
) -> CompileResult:
    if request.verify == "numerics":
        _check_twin(request, opened, bound, planning, ledger, cache)
    context = _calibrated(request, opened, bound, planning, results, ledger, cache)
    compiled = _run_passes(request, opened, bound, context, ledger, cache)
    backend = backend_for(request.parsed_target)
    needed = backend.estimate_bytes(compiled.final, compiled.portable)
    check_memory(compile_bytes(bound), available_memory_bytes())
    with ArtifactWriter(request.output_path(), force=request.force, needed_bytes=needed) as writer:
        with ledger.stage("write weights"):
            backend.emit(
                compiled.final,
                compiled.portable,
                writer,
                lambda weight: ledger.progress.advance(weight.done_bytes, weight.total_bytes, weight.name),
                cache=cache.recall_bytes,
            )
        quality = finish_artifact(
            request, opened.checkpoint, compiled, writer, ledger, calibration=context.calibration
        )
        with ledger.stage("hash the source and commit"):
            artifact = writer.commit(make_manifest(request, opened.checkpoint, compiled))
    return _result(request, compiled, ledger, cache, size_bytes=artifact.size_bytes, quality=quality)


def _planned(
    request: CompileRequest,
    opened: _Opened,
    bound: Program,
    planning: PassContext,
    ledger: Ledger,
    cache: CompileCache,
) -> Compiled:
    """What the passes will make, by shapes alone: a recipe that does not fit the model, and what the target
    or the disk cannot hold, are refused before hours are spent on calibration."""
    with ledger.stage("check the plan"):
        unchecked = replace(request, verify="off", dump_ir=None)
        planned = run_pipeline(opened.pipeline, bound, planning, unchecked, ledger.progress, cache)
        needed = backend_for(request.parsed_target).estimate_bytes(planned.final, planned.portable)
        check_disk_space(request.output_path().parent, needed)
        return planned


def _calibrated(
    request: CompileRequest,
    opened: _Opened,
    bound: Program,
    planning: PassContext,
    results: Path,
    ledger: Ledger,
    cache: CompileCache,
) -> PassContext:
    planned: Compiled | None = None
    if any(needs_calibration(pass_) for pass_ in opened.pipeline.passes):
        planned = _planned(request, opened, bound, planning, ledger, cache)

    def check(num_tokens: int) -> None:
        if planned is not None:
            available = available_memory_bytes()
            passes = opened.pipeline.passes
            check_calibration(planned.fused, passes, num_tokens, MEMORY_BYTES, results, available)

    with ledger.stage("prepare calibration") as line:
        folder = opened.checkpoint.folder
        prepared = calibration_of(
            request.calibration,
            opened.pipeline,
            bound,
            planning,
            folder,
            results,
            ledger.progress,
            check,
            cache,
        )
        calibration = prepared.calibration
        if calibration.sequences:
            known = ", known" if prepared.cached else ""
            line.note = f"{calibration.num_tokens} tokens of {calibration.source}{known}"
    return replace(planning, planning=False, calibration=calibration)


def _run_passes(
    request: CompileRequest,
    opened: _Opened,
    bound: Program,
    context: PassContext,
    ledger: Ledger,
    cache: CompileCache,
) -> Compiled:
    with ledger.stage("run passes") as line:
        compiled = run_pipeline(opened.pipeline, bound, context, request, ledger.progress, cache)
        known = sum(entry.cached for entry in compiled.passes)
        line.note = f"{known} of {len(compiled.passes)} known" if known else ""
    return compiled


def _open(request: CompileRequest, ledger: Ledger) -> _Opened:
    with ledger.stage("open the model"):
        if not request.dry_run:
            check_free_name(request.output_path(), MANIFEST, force=request.force)
        pipeline = choose_pipeline(request)
        checkpoint = open_checkpoint(find_model(request.model))
        dtype = checkpoint.dtype if request.dtype is None else parse_dtype(request.dtype)
        return _Opened(checkpoint=checkpoint, pipeline=pipeline, dtype=dtype)


def _bind(request: CompileRequest, opened: _Opened, ledger: Ledger, cache: CompileCache) -> Program:
    checkpoint, limit = opened.checkpoint, request.max_model_len

    def trace() -> Program:
        return trace_config(checkpoint.config, dtype=opened.dtype, max_context=limit)

    with ledger.stage("trace") as line:
        program, known = recall_trace(cache, checkpoint.raw_config, (opened.dtype, limit), trace)
        line.note = "known" if known else ""
    with ledger.stage("bind the weights"):
        bound = bind_checkpoint(program, checkpoint)
        weights = WeightStore(bound.weights.entries, bound.weights.ties, Reader(cache))
        return bound.replace(weights=weights)


def _check_twin(
    request: CompileRequest,
    opened: _Opened,
    bound: Program,
    context: PassContext,
    ledger: Ledger,
    cache: CompileCache,
) -> None:
    checkpoint, pipeline = opened.checkpoint, opened.pipeline

    def check_family() -> None:
        self_check(checkpoint.config, max_context=request.max_model_len)

    def check_passes() -> None:
        check_on_twin(checkpoint.config, pipeline, bound, context)

    with ledger.stage("check a small twin") as line, one_thread():
        model = (checkpoint.raw_config, request.max_model_len)
        known = recall_check(cache, ("family", *model), check_family)
        if not is_small(bound):
            inputs = ("passes", *model, opened.dtype, pipeline.passes, context)
            known = recall_check(cache, inputs, check_passes) and known
        line.note = "known to pass" if known else ""


def _result(
    request: CompileRequest,
    compiled: Compiled,
    ledger: Ledger,
    cache: CompileCache,
    *,
    size_bytes: int,
    quality: Quality | None,
) -> CompileResult:
    return CompileResult(
        path=request.output_path(),
        target=request.parsed_target.name,
        recipe=compiled.pipeline.name,
        dry_run=request.dry_run,
        seconds=ledger.total_seconds,
        size_bytes=size_bytes,
        bits_per_weight=bits_per_weight(compiled.final),
        fit=fit(compiled.final, available_memory_bytes()),
        quality=quality,
        passes=compiled.passes,
        ledger=tuple(ledger.stages),
        reuse=cache.reuse(),
    )
