"""`llmc bench`: latency, throughput, the knee of goodput, and starts, of an artifact or any server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import Output, with_output

_SHARED = (
    click.argument("target"),
    click.option("--model", metavar="NAME", help="The model's name at a URL; default: its first."),
    click.option("--api-key", metavar="KEY", help="Sent to a URL."),
    click.option("--lengths", metavar="D", help="sharegpt, alpaca, fixed:IN,OUT or uniform:A-B,C-D."),
    click.option("--requests", "num_requests", type=click.IntRange(1), metavar="N", help="How many."),
    click.option("--seed", type=int, default=0, metavar="N", help="Of prompts, lengths and arrivals."),
    click.option("--stop-at-eos", is_flag=True, help="Let answers end by themselves."),
    click.option("--serve-option", multiple=True, metavar="OPT", help="Handed to `llmc serve`; repeatable."),
)
_LIMITS = (
    click.option("--ttft-limit", type=float, metavar="S", help="Good requests' time to first token."),
    click.option("--tpot-limit", type=float, metavar="S", help="Good requests' time per output token."),
    click.option("--e2e-limit", type=float, metavar="S", help="Good requests' whole time."),
)


def _with_options(*groups: tuple[Any, ...]) -> Any:
    def add(command: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


@click.group("bench")
def bench() -> None:
    """Measure an artifact, or the server at a URL, by the definitions of `vllm bench serve`.

    TARGET is an artifact, which is served on loopback meanwhile, or a URL of an OpenAI-compatible server.
    """


@bench.command()
@_with_options(_SHARED)
@with_output
def latency(output: Output, **options: Any) -> int:
    """One request at a time: time to first token, time per token, speed against the memory's."""
    from .benching import run_latency

    return run_latency(output, options)


@bench.command()
@_with_options(_SHARED, _LIMITS)
@click.option("--rate", type=float, metavar="R", help="Requests per second, Poisson; default: all at once.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=64, help="Under way at a time, without --rate."
)
@with_output
def throughput(output: Output, **options: Any) -> int:
    """Many requests: tokens per second, latencies, goodput."""
    from .benching import run_throughput

    return run_throughput(output, options)


@bench.command()
@_with_options(_SHARED, _LIMITS)
@click.option("--rate", type=float, metavar="R", help="The first rate; default: 1 per second.")
@with_output
def sweep(output: Output, **options: Any) -> int:
    """Rising rates up to the knee, beyond which goodput falls behind."""
    from .benching import run_sweep

    return run_sweep(output, options)


@bench.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--starts", type=click.IntRange(1), default=5, metavar="N", help="How many.")
@click.option("--serve-option", multiple=True, metavar="OPT", help="Handed to `llmc serve`; repeatable.")
@with_output
def start(output: Output, artifact: Path, starts: int, serve_option: tuple[str, ...]) -> int:
    """A server from process start to ready, and where the time went."""
    from .benching import run_start

    return run_start(output, artifact, starts, serve_option)
