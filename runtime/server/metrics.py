"""Counting, in a registry of its own. What is counted stands in `metric_table`; here is only how."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .messages import EngineSnapshot
from .metric_table import METRICS, PREFIX
from .metric_table import Metric as Row
from .recent import Recent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Snapshots = Callable[[], Iterable[tuple[str, EngineSnapshot]]]


class Metrics:
    """All metrics of one server; `snapshots` gives the engines' own numbers by model name."""

    def __init__(self, snapshots: Snapshots, with_vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._with_vllm_names = with_vllm_names
        self._by_name: dict[str, Any] = {
            row.name: _make(row, self.registry) for row in METRICS if not row.from_engine
        }
        self.registry.register(_EngineCollector(snapshots))

    def of(self, name: str, model: str, **labels: str) -> Any:
        """The child of a metric for one model, to be kept by whoever counts often."""
        return self._by_name[name].labels(model_name=model, **labels)

    def expose(self) -> bytes:
        """The text that Prometheus reads."""
        own = generate_latest(self.registry)
        if not self._with_vllm_names:
            return own
        return own + generate_latest(cast("CollectorRegistry", _VllmNames(self.registry)))


class ModelMetrics:
    """The metrics of one model, looked up once, and its last minutes."""

    def __init__(self, metrics: Metrics, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._model = model
        self.recent = Recent(clock)
        self.prefix_queries = metrics.of("prefix_cache_queries", model)
        self.prefix_hits = metrics.of("prefix_cache_hits", model)
        self.prompt_tokens_cached = metrics.of("prompt_tokens_cached", model)
        self.prompt_tokens = metrics.of("prompt_tokens", model)
        self.generation_tokens = metrics.of("generation_tokens", model)
        self.disconnects = metrics.of("client_disconnects", model)
        self.ttft_s = metrics.of("time_to_first_token_seconds", model)
        self.itl_s = metrics.of("inter_token_latency_seconds", model)
        self.tpot_s = metrics.of("request_time_per_output_token_seconds", model)
        self.e2e_s = metrics.of("e2e_request_latency_seconds", model)
        self.queue_s = metrics.of("request_queue_time_seconds", model)
        self.prefill_s = metrics.of("request_prefill_time_seconds", model)
        self.decode_s = metrics.of("request_decode_time_seconds", model)
        self.inference_s = metrics.of("request_inference_time_seconds", model)
        self.request_prompt_tokens = metrics.of("request_prompt_tokens", model)
        self.request_generation_tokens = metrics.of("request_generation_tokens", model)
        self.max_tokens = metrics.of("request_params_max_tokens", model)
        self.longest_generation = metrics.of("request_max_num_generation_tokens", model)
        self.n = metrics.of("request_params_n", model)

    def finished(self, reason: str) -> None:
        self.recent.num_finished += 1
        self._metrics.of("request_success", self._model, finished_reason=reason).inc()

    def rejected(self, code: str) -> None:
        self.recent.num_refused += 1
        self._metrics.of("request_rejections", self._model, code=code).inc()

    def fell_back(self, reason: str) -> None:
        self._metrics.of("request_fallbacks", self._model, reason=reason).inc()


def _make(row: Row, registry: CollectorRegistry) -> Any:
    names = ("model_name", *row.labels)
    if row.kind == "histogram":
        return Histogram(PREFIX + row.name, row.help, names, registry=registry, buckets=row.buckets)
    kind = Counter if row.kind == "counter" else Gauge
    return kind(PREFIX + row.name, row.help, names, registry=registry)


class _VllmNames:
    """The metrics that vLLM has too, under its prefix, so that its dashboards read this server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        shared = {PREFIX + row.name for row in METRICS if row.vllm}
        for family in self._registry.collect():
            if family.name not in shared:
                continue
            renamed = Metric(_vllm(family.name), family.documentation, family.type)
            renamed.samples = [sample._replace(name=_vllm(sample.name)) for sample in family.samples]
            yield renamed


def _vllm(name: str) -> str:
    return "vllm:" + name.removeprefix(PREFIX)


class _EngineCollector(Collector):
    """Reads the engines when somebody scrapes."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterable[Metric]:
        snapshots = list(self._snapshots())
        for row in METRICS:
            if not row.from_engine:
                continue
            family = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
            metric = family(PREFIX + row.name, row.help, labels=("model_name", *row.labels))
            for model, snapshot in snapshots:
                for labels, value in _values(row.name, snapshot):
                    metric.add_metric((model, *labels), value)
            yield metric


def _values(name: str, snapshot: EngineSnapshot) -> list[tuple[tuple[str, ...], float]]:
    """(own labels, value) of one engine metric."""
    if name == "spec_decode_num_accepted_tokens_per_pos":
        return [((str(place),), count) for place, count in enumerate(snapshot.accepted_at)]
    if name == "num_requests_waiting_by_reason":
        preempted = snapshot.num_preempted
        return [(("preempted",), preempted), (("capacity",), snapshot.num_waiting - preempted)]
    plain = {
        "num_requests_running": snapshot.num_running,
        "num_requests_waiting": snapshot.num_waiting,
        "kv_cache_usage_perc": snapshot.kv_usage,
        "num_preemptions": snapshot.num_preemptions,
        "engine_steps": snapshot.num_steps,
        "engine_failed_steps": snapshot.num_failed_steps,
        "computed_tokens": snapshot.num_computed_tokens,
        "engine_restarts": snapshot.num_restarts,
        "corrupted_requests": snapshot.num_corrupted,
        "response_cache_hits": snapshot.num_response_hits,
        "response_cache_misses": snapshot.num_response_misses,
        "response_cache_bytes": snapshot.response_bytes,
        "spec_decode_num_drafts": snapshot.drafted_at[0] if snapshot.drafted_at else 0,
        "spec_decode_num_draft_tokens": sum(snapshot.drafted_at),
        "spec_decode_num_accepted_tokens": sum(snapshot.accepted_at),
    }
    return [((), plain[name])]
