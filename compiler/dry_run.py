"""A compile that decides everything and writes nothing: what would be made, and whether it fits here."""

from __future__ import annotations

from ..runtime.fit import Fit
from ..runtime.memory import available_memory_bytes
from .checkpoint import open_checkpoint, parse_dtype
from .estimate import Estimator
from .fitting import Asked, ways_to_fit
from .ledger import Ledger
from .pipeline import choose_pipeline
from .request import CompileRequest
from .result import CompileResult
from .shards import holds_weights
from .source import find_model


def plan_compile(request: CompileRequest, ledger: Ledger) -> CompileResult:
    """The result that the compile would have, by one layer of each kind. Needs config.json alone; weights and
    tokenizer that are there are checked as far as their headers go.

    Raises what the compile would raise for the model and for what was asked.
    """
    with ledger.stage("open the model"):
        pipeline = choose_pipeline(request)
        folder = find_model(request.model)
        if holds_weights(folder):
            open_checkpoint(folder)
    with ledger.stage("trace one layer of each kind"):
        estimator = Estimator(
            folder,
            target=request.parsed_target,
            dtype=None if request.dtype is None else parse_dtype(request.dtype),
            max_context=request.max_model_len,
        )
    with ledger.stage("run passes"):
        estimate = estimator.estimate(pipeline.name, pipeline.passes)
        files = estimator.file_bytes(pipeline.passes)
    fit = estimate.fit(available_memory_bytes(), estimate.max_context)
    return CompileResult(
        path=request.output_path(),
        target=request.parsed_target.name,
        recipe=pipeline.name,
        dry_run=True,
        seconds=ledger.total_seconds,
        size_bytes=files.at_most,
        bits_per_weight=estimate.bits_per_weight,
        fit=fit,
        quality=None,
        passes=estimate.passes,
        ledger=tuple(ledger.stages),
        ways=() if fit.requests else _ways(request, estimator, fit),
    )


def _ways(request: CompileRequest, estimator: Estimator, fit: Fit) -> tuple[str, ...]:
    """What would fit in place of what was asked for; a recipe that is no preset is compared with `none`."""
    asked = Asked(
        quant=request.quant or "none",
        kv_dtype=request.kv_dtype or "auto",
        context=fit.tokens_per_request,
        memory_bytes=fit.memory_bytes,
    )
    return tuple(way.text for way in ways_to_fit(estimator, asked))
