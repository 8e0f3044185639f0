"""What the status page shows, gathered when it is asked for. Knows models and their recent numbers."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ... import __version__
from .recent import Percentiles, percentiles
from .state import ServedModel, ServerState

RATE_S = 10
PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:"
    ),
    "cache-control": "no-cache",
}


class LiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has not ended. `num_sequences` are its prompts times completions."""

    age_s: float
    num_sequences: int
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model. Rates are of the last ten seconds, percentiles of the last samples; None where there is
    nothing to tell. Lengths are (at most so many tokens, texts)."""

    name: str
    executor: str
    details: dict[str, str]
    num_running: int
    num_waiting: int
    max_requests: int
    kv_usage: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    history: list[int]
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    prefix_hit_rate: float | None
    response_hit_rate: float | None
    response_hits: int
    response_misses: int
    response_bytes: int
    acceptance: float | None
    prompt_lengths: list[tuple[int, int]]
    output_lengths: list[tuple[int, int]]
    num_finished: int
    num_refused: int
    requests: list[LiveRequest]
    failure: str | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The server. `cost_per_1k` is what 1000 generated tokens cost at the present rate."""

    version: str
    uptime_s: float
    is_draining: bool
    hourly_price: float | None
    currency: str
    cost_per_1k: float | None
    models: list[ModelStatus]


def status_page() -> bytes:
    """The page that draws `Status`."""
    return Path(__file__).with_name("status.html").read_bytes()


def status_of(state: ServerState) -> Status:
    """All of it, now."""
    now_s = state.clock()
    models = [_model_status(model, now_s) for model in state.models.values()]
    price = state.config.hourly_price
    rate = sum(model.tokens_per_s for model in models)
    return Status(
        version=__version__,
        uptime_s=now_s - state.started_s,
        is_draining=state.is_draining,
        hourly_price=price,
        currency=state.config.currency,
        cost_per_1k=price / 3600 / rate * 1000 if price is not None and rate else None,
        models=models,
    )


def _model_status(model: ServedModel, now_s: float) -> ModelStatus:
    snapshot = model.client.snapshot()
    recent = model.metrics.recent
    drafted = sum(snapshot.drafted_at)
    queries = recent.num_prefix_queries
    asked = snapshot.num_response_hits + snapshot.num_response_misses
    history = recent.tokens.history()
    return ModelStatus(
        name=model.name,
        executor=model.client.facts.executor,
        details=model.client.facts.details,
        num_running=snapshot.num_running,
        num_waiting=snapshot.num_waiting,
        max_requests=model.codec.limits.max_requests,
        kv_usage=snapshot.kv_usage,
        tokens_per_s=_mean(history[-RATE_S:]),
        prompt_tokens_per_s=_mean(recent.prompt_tokens.history()[-RATE_S:]),
        history=history,
        ttft_s=percentiles(recent.ttft_s),
        itl_s=percentiles(recent.itl_s),
        prefix_hit_rate=recent.num_prefix_hits / queries if queries else None,
        response_hit_rate=snapshot.num_response_hits / asked if asked else None,
        response_hits=snapshot.num_response_hits,
        response_misses=snapshot.num_response_misses,
        response_bytes=snapshot.response_bytes,
        acceptance=sum(snapshot.accepted_at) / drafted if drafted else None,
        prompt_lengths=recent.prompt_lengths.bars(),
        output_lengths=recent.output_lengths.bars(),
        num_finished=recent.num_finished,
        num_refused=recent.num_refused,
        requests=[
            LiveRequest(
                age_s=now_s - run.arrival_s,
                num_sequences=run.plan.num_sequences,
                num_prompt_tokens=sum(map(len, run.plan.prompts)),
                num_output_tokens=run.num_output_tokens,
                max_tokens=sum((each.max_tokens or 0) * each.n for each in run.plan.params),
            )
            for run in sorted(model.live, key=lambda run: run.arrival_s)
        ],
        failure=snapshot.failure,
    )


def _mean(counts: list[int]) -> float:
    return sum(counts) / len(counts) if counts else 0.0
