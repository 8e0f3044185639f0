"""Every metric, declared once: name behind the prefix, kind, labels, buckets, help. Names and buckets that
vLLM has too are vLLM's."""

from __future__ import annotations

from typing import Literal, NamedTuple

PREFIX = "llmc:"
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
PER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
END_TO_END_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
COMPLETIONS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Metric(NamedTuple):
    """`name` is without prefix; a counter is exported with `_total` behind it. Every metric has the label
    `model_name` before its own `labels`. Those `from_engine` are read when somebody asks; those that
    `vllm` has too may be exported under its prefix as well."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    from_engine: bool = False
    vllm: bool = True


METRICS = (
    Metric("num_requests_running", "gauge", "Sequences in the running batch.", from_engine=True),
    Metric("num_requests_waiting", "gauge", "Sequences waiting for a row or pages.", from_engine=True),
    Metric(
        "num_requests_waiting_by_reason",
        "gauge",
        "Sequences waiting: for capacity, or to be computed again after they were preempted.",
        ("reason",),
        from_engine=True,
    ),
    Metric("kv_cache_usage_perc", "gauge", "Share of KV pages in use, 1 is all.", from_engine=True),
    Metric("num_preemptions", "counter", "Sequences put back into the queue.", from_engine=True),
    Metric("engine_steps", "counter", "Steps that have run.", from_engine=True, vllm=False),
    Metric("engine_failed_steps", "counter", "Steps that have failed.", from_engine=True, vllm=False),
    Metric(
        "computed_tokens", "counter", "Positions computed, prefill included.", from_engine=True, vllm=False
    ),
    Metric("engine_restarts", "counter", "Engine processes that died.", from_engine=True, vllm=False),
    Metric("corrupted_requests", "counter", "Sequences that ended over a NaN.", from_engine=True),
    Metric("spec_decode_num_drafts", "counter", "Drafts verified.", from_engine=True),
    Metric("spec_decode_num_draft_tokens", "counter", "Draft tokens verified.", from_engine=True),
    Metric("spec_decode_num_accepted_tokens", "counter", "Draft tokens accepted.", from_engine=True),
    Metric(
        "spec_decode_num_accepted_tokens_per_pos",
        "counter",
        "Draft tokens accepted, by their place in the draft.",
        ("position",),
        from_engine=True,
    ),
    Metric(
        "response_cache_hits",
        "counter",
        "Requests answered from the response cache.",
        from_engine=True,
        vllm=False,
    ),
    Metric(
        "response_cache_misses",
        "counter",
        "Deterministic requests that were not found there.",
        from_engine=True,
        vllm=False,
    ),
    Metric("response_cache_bytes", "gauge", "Memory of the response cache.", from_engine=True, vllm=False),
    Metric("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    Metric("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    Metric("prompt_tokens_cached", "counter", "Prompt tokens that were not computed again."),
    Metric("prompt_tokens", "counter", "Prompt tokens of requests that have begun to answer."),
    Metric("generation_tokens", "counter", "Tokens generated."),
    Metric("request_success", "counter", "Sequences by how they ended.", ("finished_reason",)),
    Metric("request_rejections", "counter", "Requests refused, by error code.", ("code",), vllm=False),
    Metric(
        "request_fallbacks",
        "counter",
        "Requests that another model answered, by why.",
        ("reason",),
        vllm=False,
    ),
    Metric("client_disconnects", "counter", "Requests whose client left, or read too slowly.", vllm=False),
    Metric("time_to_first_token_seconds", "histogram", "Arrival to first token.", (), TTFT_S),
    Metric("inter_token_latency_seconds", "histogram", "Between news of a sequence.", (), PER_TOKEN_S),
    Metric(
        "request_time_per_output_token_seconds",
        "histogram",
        "(End to end - first token) / (tokens - 1), of a sequence.",
        (),
        PER_TOKEN_S,
    ),
    Metric("e2e_request_latency_seconds", "histogram", "Arrival to end, of a sequence.", (), END_TO_END_S),
    Metric("request_queue_time_seconds", "histogram", "Arrival to the first step.", (), END_TO_END_S),
    Metric("request_prefill_time_seconds", "histogram", "First step to first token.", (), END_TO_END_S),
    Metric("request_decode_time_seconds", "histogram", "First token to end.", (), END_TO_END_S),
    Metric("request_inference_time_seconds", "histogram", "First step to end.", (), END_TO_END_S),
    Metric("request_prompt_tokens", "histogram", "Tokens of a prompt.", (), TOKENS),
    Metric("request_generation_tokens", "histogram", "Tokens of a completion.", (), TOKENS),
    Metric("request_params_max_tokens", "histogram", "max_tokens in effect.", (), TOKENS),
    Metric(
        "request_max_num_generation_tokens",
        "histogram",
        "Tokens of the longest completion of a request.",
        (),
        TOKENS,
    ),
    Metric("request_params_n", "histogram", "Completions asked for.", (), COMPLETIONS),
)
