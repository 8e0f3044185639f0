"""The four benches: latency of single requests, throughput, a sweep over rates, and the start of a server."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...spec.errors import TargetError
from .client import Endpoint, Sample, send
from .device_memory import device_bandwidth
from .measures import Limits, Measures, measure, spread
from .workload import Ask, arrivals, draw_sizes, make_asks

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is offered. Without `rate_per_s` everything is due at once, and at most `concurrency` requests
    are under way at a time; with it requests are sent when they are due, however many are under way."""

    lengths: str = "sharegpt"
    num_requests: int = 100
    rate_per_s: float | None = None
    concurrency: int = 64
    seed: int = 0
    vocab_size: int | None = None
    max_model_len: int | None = None


def offer(endpoint: Endpoint, load: Load, progress: Progress = lambda _: None) -> list[Sample]:
    """Runs the load and waits for its end; `progress` is told how many requests have ended."""
    rng = random.Random(load.seed)
    sizes = draw_sizes(load.lengths, load.num_requests, rng, load.max_model_len)
    times = arrivals(load.num_requests, load.rate_per_s, rng)
    asks = make_asks(sizes, times, rng, load.vocab_size)
    limit = None if load.rate_per_s is not None else load.concurrency
    return asyncio.run(_offer(endpoint, asks, limit, progress))


async def _offer(
    endpoint: Endpoint, asks: Sequence[Ask], concurrency: int | None, progress: Progress
) -> list[Sample]:
    started_s = time.perf_counter()
    gate = asyncio.Semaphore(concurrency if concurrency is not None else max(1, len(asks)))

    async def one(ask: Ask) -> Sample:
        await asyncio.sleep(max(0.0, ask.at_s - (time.perf_counter() - started_s)))
        async with gate:
            sample = await send(endpoint, ask, started_s)
        progress(1)
        return sample

    return await asyncio.gather(*(one(ask) for ask in asks))


def bench_latency(
    endpoint: Endpoint,
    load: Load,
    *,
    weight_bytes: int | None,
    on_gpu: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """One request at a time, after one that warms up. `bandwidth_fraction` is the weights read per token
    over what this machine's memory gives to a copy of a large array, or over its GPU's memory at its highest
    clock; None where the weights are elsewhere, or nothing says how fast that memory is."""
    samples = offer(endpoint, _with(load, concurrency=1, num_requests=load.num_requests + 1), progress)[1:]
    measures = _checked(measure(samples, Limits()))
    good = [sample for sample in samples if sample.error is None]
    decode = [1 / sample.tpot_s for sample in good if sample.tpot_s]
    rates = spread(decode)
    share = None
    if rates is not None and weight_bytes:
        bandwidth = device_bandwidth() if on_gpu else memory_bandwidth()
        share = None if bandwidth is None else rates.p50 * weight_bytes / bandwidth
    return {
        **measures.as_dict(),
        "prefill_tokens_per_s": _plain(spread([s.num_prompt_tokens / s.ttft_s for s in good])),
        "decode_tokens_per_s": _plain(rates),
        "bandwidth_fraction": share,
    }


def bench_throughput(
    endpoint: Endpoint, load: Load, limits: Limits, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """All requests at once, or at a rate."""
    samples = offer(endpoint, load, progress)
    return _checked(measure(samples, limits, load.rate_per_s)).as_dict()


def bench_sweep(
    endpoint: Endpoint, load: Load, limits: Limits, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Doubles the rate from `rate_per_s` (1) until less than 90 % of it is good, then halves the gap three
    times. `knee_per_s` is the highest rate of which 90 % were good; None when the first was too much."""
    rows: list[dict[str, Any]] = []
    low: float | None = None
    high: float | None = None
    rate = load.rate_per_s or 1.0
    for _ in range(16):
        measures = measure(
            offer(endpoint, _with(load, rate_per_s=rate, seed=load.seed + len(rows)), progress), limits, rate
        )
        rows.append({"rate_per_s": rate, **measures.as_dict()})
        share = measures.goodput_per_s / max(_offered(rate, measures), 1e-9)
        if share >= 0.9 and measures.saturation is None and not measures.errors:
            low = rate
        else:
            high = rate
        if low is None or (high is not None and high / low < 2 ** (1 / 4)):
            break
        rate = low * 2 if high is None else (low * high) ** 0.5
    rows.sort(key=lambda row: row["rate_per_s"])
    return {"rows": rows, "knee_per_s": low, "first_too_much_per_s": high}


def _offered(rate_per_s: float, measures: Measures) -> float:
    """The rate that came true: the last request still takes its own time after the last arrival."""
    return min(rate_per_s, measures.requests / max(measures.wall_s, 1e-9))


def memory_bandwidth() -> float:
    """Bytes read and written per second by copies of a large array, one thread a core, best of three."""
    num_threads = len(os.sched_getaffinity(0))
    arrays = [(np.ones(2**25, np.float32), np.zeros(2**25, np.float32)) for _ in range(num_threads)]

    def copy(pair: tuple[NDArray[np.float32], NDArray[np.float32]]) -> None:
        np.copyto(pair[1], pair[0])

    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(3):
            started_s = time.perf_counter()
            list(pool.map(copy, arrays))
            best = max(best, num_threads * 2 * arrays[0][0].nbytes / (time.perf_counter() - started_s))
    return best


def _checked(measures: Measures) -> Measures:
    """TargetError where no request at all ended well: there is nothing to report."""
    if measures.errors == measures.requests:
        kind = next(iter(measures.error_kinds), "none was sent")
        raise TargetError(
            "bench.no_answers",
            "No request ended well.",
            f"The first error was: {kind}.",
            "Check the address, the model's name and the lengths.",
        )
    return measures


def _with(load: Load, **changes: Any) -> Load:

    return replace(load, **changes)


def _plain(value: Any) -> dict[str, float] | None:

    return None if value is None else asdict(value)
