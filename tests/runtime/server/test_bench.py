"""`llmc bench`: its definitions on samples made by hand, and its runs against a simulated server."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from llmc.cli.main import main
from llmc.runtime.bench.client import Endpoint, Sample
from llmc.runtime.bench.measures import Limits, find_saturation, measure, spread
from llmc.runtime.bench.runs import Load, bench_latency, offer
from llmc.runtime.bench.workload import arrivals, draw_sizes
from llmc.spec.errors import UsageError

pytestmark = pytest.mark.pure


def sample(scheduled, sent, *events, prompt=10, tokens=None, **more):
    return Sample(
        scheduled_s=scheduled,
        sent_s=sent,
        event_s=list(events),
        num_prompt_tokens=prompt,
        num_output_tokens=len(events) if tokens is None else tokens,
        status=200,
        **more,
    )


def test_the_definitions():
    samples = [sample(0.0, 0.5, 1.0, 1.25, 2.0), sample(1.0, 1.0, 4.0), sample(0.0, 0.0, error="no")]
    got = measure(samples, Limits(ttft_s=1.0), rate_per_s=1.0)
    assert (got.requests, got.errors, got.wall_s) == (3, 1, 4.0)
    assert got.ttft_s.p50 == 0.5
    assert got.ttft_s.p99 == 3.0
    assert got.tpot_s.p50 == got.tpot_s.p99 == pytest.approx((1.5 - 0.5) / 2)
    assert got.client_lag_s.p99 == 0.5
    assert got.goodput_per_s == pytest.approx(1 / 4)
    assert got.output_tokens_per_s == pytest.approx(4 / 4)
    assert got.total_tokens_per_s == pytest.approx(24 / 4)
    assert sorted(got.error_kinds) == ["no"]
    assert measure(samples, Limits()).client_lag_s is None


def test_several_tokens_in_one_event_count_as_such():
    (got,) = [sample(0.0, 0.0, 1.0, 2.0, tokens=5)]
    assert got.tpot_s == pytest.approx(0.25)


def test_limits_are_all_met_or_not():
    one = sample(0.0, 0.0, 1.0, 3.0)
    assert Limits(ttft_s=1.0, tpot_s=2.0, e2e_s=3.0).are_met(one)
    assert not Limits(e2e_s=2.9).are_met(one)
    assert Limits(tpot_s=0.001).are_met(sample(0.0, 0.0, 1.0)), "one token has no time per token"


def test_saturation_is_seen_and_said():
    steady = [sample(n, n, n + 0.2, n + 0.5) for n in range(30)]
    assert find_saturation(steady, 1.0) is None
    queueing = [sample(n / 4, n / 4, n + 0.2, n + 0.5) for n in range(30)]
    assert "under way when the last one came" in find_saturation(queueing, 4.0)
    refused = [*steady, Sample(scheduled_s=1.0, status=503, error="full")]
    assert "1 of 31 requests were turned away" in find_saturation(refused, 1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_samples_in_order(values):
    got = spread(values)
    assert min(values) <= got.p50 <= got.p90 <= got.p99 <= max(values)
    assert {got.p50, got.p90, got.p99} <= set(values)
    assert sum(value <= got.p90 for value in values) >= 0.9 * len(values)


def test_arrivals_are_a_poisson_process():
    times = arrivals(5000, 4.0, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)
    assert arrivals(3, None, random.Random(1)) == [0.0, 0.0, 0.0]


def test_lengths_are_those_of_the_name():
    rng = random.Random(2)
    sharegpt = draw_sizes("sharegpt", 4000, rng, None)
    assert statistics.fmean(size.num_prompt_tokens for size in sharegpt) == pytest.approx(161 * 0.9, rel=0.15)
    assert statistics.median(size.num_prompt_tokens for size in sharegpt) < 161
    assert {size.num_prompt_tokens for size in draw_sizes("fixed:7,3", 5, rng, None)} == {7}
    bounded = draw_sizes("uniform:1-9,20-30", 200, rng, 32)
    assert all(size.num_prompt_tokens + size.num_output_tokens <= 32 for size in bounded)
    for wrong in ("other", "fixed:3", "fixed:0,1", "uniform:5-1,1-2", "uniform:a-b,1-2"):
        with pytest.raises(UsageError, match="cannot be drawn"):
            draw_sizes(wrong, 1, rng, None)
    with pytest.raises(UsageError, match="fits the context"):
        draw_sizes("fixed:30,30", 1, rng, 32)


def test_a_load_is_done_as_asked(serve):
    running = serve(caps={"max_context": 128})
    endpoint = Endpoint(url=running.url, model="letters")
    load = Load(lengths="uniform:5-20,4-30", num_requests=20, concurrency=4, vocab_size=28, seed=3)
    ended = []
    samples = offer(endpoint, load, ended.append)
    sizes = draw_sizes(load.lengths, 20, random.Random(3), None)
    assert sum(ended) == 20
    assert [each.error for each in samples] == [None] * 20
    assert [each.num_prompt_tokens for each in samples] == [size.num_prompt_tokens for size in sizes]
    assert [each.num_output_tokens for each in samples] == [size.num_output_tokens for size in sizes]
    assert all(each.sent_s < each.event_s[0] <= each.event_s[-1] for each in samples)


def test_refusals_are_samples_with_errors(serve):
    running = serve(max_waiting=0, caps={"max_rows": 1}, runtime=None)
    running.executor.delay_s = 0.01
    load = Load(lengths="fixed:5,20", num_requests=6, concurrency=6, vocab_size=28)
    samples = offer(Endpoint(url=running.url, model="letters"), load)
    assert {each.status for each in samples} == {200, 503}
    assert all("server.overloaded" in each.error for each in samples if each.status == 503)
    (absent,) = offer(Endpoint(url="http://127.0.0.1:9", model="x"), Load(num_requests=1))
    assert absent.status == 0
    assert "Error" in absent.error


@pytest.mark.slow
def test_a_sweep_finds_the_knee(serve):
    """One row of 20 tokens at 5 ms each: about 10 requests a second, and no more."""
    running = serve(caps={"max_rows": 1})
    running.executor.delay_s = 0.005
    load = ("--lengths", "fixed:3,20", "--requests", 16, "--rate", 2, "--ttft-limit", 0.3)
    asked = invoke("sweep", running.url, *load, "--json")
    assert asked.exit_code == 0, asked.output
    got = json.loads(asked.stdout)
    rates = [row["rate_per_s"] for row in got["rows"]]
    assert rates == sorted(rates)
    assert got["knee_per_s"] in rates
    assert got["knee_per_s"] < got["first_too_much_per_s"] <= 32


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_measures_a_url(serve):
    running = serve()
    running.executor.delay_s = 0.003
    shared = ("--lengths", "fixed:4,8", "--requests", 5)
    asked = invoke("throughput", f"{running.url}/v1", *shared, "--json")
    assert asked.exit_code == 0, asked.output
    got = json.loads(asked.stdout)
    assert (got["requests"], got["errors"], got["output_tokens"]) == (5, 0, 40)
    assert got["ttft_s"]["p50"] > 0
    single = json.loads(invoke("latency", running.url, *shared, "--json").stdout)
    assert single["decode_tokens_per_s"]["p50"] == pytest.approx(1 / single["tpot_s"]["p50"], rel=0.5)
    assert single["bandwidth_fraction"] is None
    shown = invoke("throughput", running.url, *shared, "--rate", 50).stdout
    for words in ("time to first token", "p99", "█", "0 of them failed"):
        assert words in shown
    for arguments, code, words in (
        (("throughput", "http://127.0.0.1:9"), 4, "cannot be measured"),
        (("throughput", running.url, "--model", "other"), 4, "has no model 'other'"),
        (("throughput", running.url, "--rate", "-1"), 2, "The rate is -1"),
        (("throughput", running.url, "--lengths", "x"), 2, "cannot be drawn"),
        (("latency", "/no/such.llmc"), 3, "no artifact"),
        (("start", "/no/such.llmc"), 4, "did not start"),
    ):
        got = invoke(*arguments)
        assert (got.exit_code, words in got.stderr) == (code, True), got.stderr


def test_weights_on_a_gpu_are_held_to_its_memory(serve, monkeypatch):
    """As NVIDIA's library says of an H200: 3201 MHz, 6144 lines."""

    class Broken(Exception):
        pass

    library = SimpleNamespace(
        NVMLError=Broken,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMaxClockInfo=lambda handle, clock: {2: 3201}[clock],
        nvmlDeviceGetMemoryBusWidth=lambda handle: 6144,
    )
    running = serve()
    running.executor.delay_s = 0.003  # or all tokens may come in one event
    endpoint = Endpoint(url=running.url, model="letters")
    load = Load(lengths="fixed:3,8", num_requests=3, vocab_size=28)

    def measured():
        got = bench_latency(endpoint, load, weight_bytes=10**9, on_gpu=True)
        return got["bandwidth_fraction"], got["decode_tokens_per_s"]["p50"]

    monkeypatch.setitem(sys.modules, "pynvml", library)
    share, rate = measured()
    assert share == pytest.approx(rate * 1e9 / 4.917e12, rel=1e-3)

    def lost():
        raise Broken

    library.nvmlInit = lost
    assert measured()[0] is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measured()[0] is None


def test_no_answers_at_all_are_an_error(serve):
    running = serve(max_output_tokens=10)
    got = invoke("throughput", running.url, "--lengths", "fixed:4,20", "--requests", 2)
    assert (got.exit_code, "No request ended well" in got.stderr) == (4, True)
    with pytest.raises(UsageError, match="not the address"):
        Endpoint(url="ftp://x", model="y")
