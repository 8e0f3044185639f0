"""How `llmc bench` gets from its options to results on the terminal or as JSON."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec.errors import UsageError
from .output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..runtime.bench.measures import Limits
    from ..runtime.bench.runs import Load, Progress
    from ..runtime.bench.target import Target


def run_latency(output: Output, options: dict[str, Any]) -> int:
    """The exit code."""
    from ..runtime.bench.report import show_run
    from ..runtime.bench.runs import bench_latency

    with _target(options) as target:
        load = _load(options, target, lengths="fixed:128,64", num_requests=10)
        with _progress(output, load.num_requests + 1) as progress:
            result = bench_latency(
                target.endpoint,
                load,
                weight_bytes=target.weight_bytes,
                on_gpu=target.on_gpu,
                progress=progress,
            )
    return _report(output, result, show_run)


def run_throughput(output: Output, options: dict[str, Any]) -> int:
    """The exit code: 1 when requests failed."""
    from ..runtime.bench.report import show_run
    from ..runtime.bench.runs import bench_throughput

    with _target(options) as target:
        load = _load(options, target, lengths="sharegpt", num_requests=100)
        with _progress(output, load.num_requests) as progress:
            result = bench_throughput(target.endpoint, load, _limits(options), progress)
    return _report(output, result, show_run)


def run_sweep(output: Output, options: dict[str, Any]) -> int:
    """The exit code."""
    from ..runtime.bench.report import show_sweep
    from ..runtime.bench.runs import bench_sweep

    with _target(options) as target:
        load = _load(options, target, lengths="sharegpt", num_requests=60)
        with _progress(output, None) as progress:
            result = bench_sweep(target.endpoint, load, _limits(options), progress)
    return _report(output, result, show_sweep)


def run_start(output: Output, artifact: Path, starts: int, serve_options: Sequence[str]) -> int:
    """The exit code."""
    from ..runtime.bench.report import show_start
    from ..runtime.bench.target import bench_start

    return _report(output, bench_start(artifact, starts, serve_options), show_start)


def _target(options: dict[str, Any]) -> contextlib.AbstractContextManager[Target]:
    from ..runtime.bench.target import open_target

    return open_target(
        options["target"],
        model=options["model"],
        api_key=options["api_key"],
        ignore_eos=not options["stop_at_eos"],
        serve_options=options["serve_option"],
    )


def _load(options: dict[str, Any], target: Target, *, lengths: str, num_requests: int) -> Load:
    from ..runtime.bench.runs import Load

    rate = options.get("rate")
    if rate is not None and not rate > 0:
        raise UsageError(
            "bench.rate",
            f"The rate is {rate:g}.",
            "Requests come at more than none per second.",
            "Give a rate above 0, or leave it out.",
        )
    return Load(
        lengths=options["lengths"] or lengths,
        num_requests=options["num_requests"] or num_requests,
        rate_per_s=rate,
        concurrency=options.get("concurrency") or 1,
        seed=options["seed"],
        vocab_size=target.vocab_size,
        max_model_len=target.max_model_len,
    )


def _limits(options: dict[str, Any]) -> Limits:
    from ..runtime.bench.measures import Limits

    return Limits(ttft_s=options["ttft_limit"], tpot_s=options["tpot_limit"], e2e_s=options["e2e_limit"])


@contextlib.contextmanager
def _progress(output: Output, total: int | None) -> Generator[Progress]:
    """A bar on stderr that counts ended requests."""
    from rich.progress import Progress as Bars

    with Bars(console=output.console(), transient=True) as bars:
        task = bars.add_task("requests", total=total)

        def advance(count: int) -> None:
            bars.advance(task, count)

        yield advance


def _report(output: Output, result: dict[str, Any], show: Callable[[dict[str, Any]], RenderableType]) -> int:
    from rich.console import Console

    text = io.StringIO()
    if not output.as_json:
        Console(file=text, width=110, highlight=False).print(show(result))
    output.result(result, text.getvalue().rstrip())
    return 1 if result.get("errors") else 0
