"""A comparison from start to end: sides opened, the same work through each, numbers into rows."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...artifact.summary import summarise
from ...runtime.tokenizer import Tokenizer
from ...spec.errors import UsageError
from ..ledger import Progress, Silent
from ..quality import PROBE_TEXTS, Quality
from .divergence import Divergence, first_divergences
from .measure import Samples, Work, measure_in_processes, side_ratios
from .quality import layer_errors, qualities, stored_program
from .runner import Runner, WorkerRunner
from .sides import Side, SideRequest, open_cache, open_sides
from .statistics import Ratio, pareto
from .table import COLUMNS, MEASURED, Column

_QUALITY_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What to compare, and how much work goes into it. Times in seconds; `price_per_hour` in any currency;
    `ttft_limit_s` and `tpot_limit_s` say which requests are good. `data` is text to judge quality on."""

    sides: SideRequest
    baseline: str | None = None
    prompts: tuple[str, ...] = PROBE_TEXTS[:3]
    data: Path | None = None
    num_tokens: int = 32
    concurrency: int = 4
    rounds: int = 60
    budget_s: float = 12.0
    price_per_hour: float | None = None
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    num_threads: int = 0
    seed: int = 0

    def validate(self) -> None:
        """Raises UsageError for numbers that no work can be done with."""
        for name in ("num_tokens", "concurrency", "rounds", "budget_s"):
            if not getattr(self, name) > 0:
                raise _no_samples(name, getattr(self, name))
        if self.num_tokens < 2:
            raise _no_samples("num_tokens", self.num_tokens)
        for name in ("price_per_hour", "ttft_limit_s", "tpot_limit_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"compare.{name}",
                    f"{name} is {value}.",
                    "It must be a number above 0.",
                    "Choose another.",
                )
        if not self.prompts or not all(self.prompts):
            raise _no_samples("prompts", len(self.prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One side. `values` are by column key (missing where nothing was asked for), `ratios` to the baseline;
    `layers` are relative errors against the reference by attention layer, the logits' last; `latencies` are
    of every request alone, in seconds and ascending, by column."""

    name: str
    values: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    layers: tuple[float, ...]
    divergence: Divergence | None
    texts: tuple[str, str, str]
    latencies: Mapping[str, tuple[float, ...]]
    executor: str
    recipe: str
    decisions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every side's row; `reference` is the side whose logits others are judged by."""

    baseline: str
    reference: str
    rows: tuple[Row, ...]
    pareto: tuple[str, ...]
    rounds: int
    concurrency: int
    num_tokens: int
    quality_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc compare --json` prints. Times in seconds, sizes in bytes."""
        rows = [
            {
                "name": row.name,
                **row.values,
                "ratios": {key: {**asdict(r), "different": r.is_different} for key, r in row.ratios.items()},
                "layer_errors": row.layers,
                "latency": {key: _quantiles(values) for key, values in row.latencies.items()},
                "first_divergence": None if row.divergence is None else asdict(row.divergence),
                "executor": row.executor,
                "recipe": row.recipe,
            }
            for row in self.rows
        ]
        facts = ("baseline", "reference", "pareto", "rounds", "concurrency", "num_tokens", "seconds")
        return {**{name: getattr(self, name) for name in facts}, "rows": rows}


def compare(
    request: CompareRequest,
    *,
    progress: Progress | None = None,
    open_runner: Callable[[Side], Runner] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Compare what `request` names. `open_runner` makes the processes that are timed (a `WorkerRunner` each
    by default).

    Raises UsageError for sides that do not belong together, a baseline that is no side, and numbers that
    cannot be meant; and whatever compiling or loading a side raises.
    """
    request.validate()
    told = progress or Silent()
    started = clock()
    with open_cache() as cache:
        sides = open_sides(request.sides, cache, told)
        baseline = _baseline(request, sides)
        make = open_runner or _worker(request)
        tokenizer = Tokenizer.from_folder(sides[0].artifact.tokenizer_folder)
        limit = min(side.artifact.manifest.spec.max_context for side in sides)
        work = _work(request, tokenizer, limit)
        texts = _sequences(request, tokenizer, limit, sides[0].artifact.manifest.spec.vocab_size)
        runners = {side.name: partial(make, side) for side in sides}
        samples = _measured(runners, work, request, told, clock)
        told.begin("compare the logits")
        parted = first_divergences(samples, baseline, work.prompts, runners)
        rows = _rows(request, sides, baseline, samples, parted, work, tokenizer, texts)
        told.end("compare the logits", 0.0)
    return Comparison(
        baseline=baseline,
        reference=_reference(sides, baseline),
        rows=rows,
        pareto=_front(rows),
        rounds=min(len(found.singles) for found in samples.values()),
        concurrency=request.concurrency,
        num_tokens=request.num_tokens,
        quality_tokens=sum(map(len, texts)),
        seconds=clock() - started,
    )


def _worker(request: CompareRequest) -> Callable[[Side], Runner]:
    return lambda side: WorkerRunner(
        side.artifact.path, num_threads=request.num_threads, max_requests=request.concurrency
    )


def _baseline(request: CompareRequest, sides: Sequence[Side]) -> str:
    names = [side.name for side in sides]
    if request.baseline is None or request.baseline in names:
        return request.baseline or names[0]
    stem = Path(request.baseline).name.removesuffix(".llmc")
    if stem in names:
        return stem
    raise UsageError(
        "compare.baseline",
        f"The baseline {request.baseline!r} is none of the sides.",
        f"The sides are: {', '.join(names)}.",
        "Name one of them with --baseline.",
    )


def _reference(sides: Sequence[Side], baseline: str) -> str:
    """The side with the most bits a weight: the original where it is among them."""
    best = max(sides, key=lambda side: summarise(side.artifact).bits_per_weight)
    bits = {side.name: summarise(side.artifact).bits_per_weight for side in sides}
    return baseline if bits[baseline] == bits[best.name] else best.name


def _work(request: CompareRequest, tokenizer: Tokenizer, limit: int) -> Work:
    room = limit - request.num_tokens - 1  # the last token, too, is asked for its log-probability
    if room < 1:
        raise UsageError(
            "compare.num_tokens",
            f"{request.num_tokens} tokens do not fit.",
            f"The model's context is {limit} tokens, and a prompt needs one at least.",
            "Choose fewer with --tokens.",
        )
    prompts = tuple(tokenizer.encode(text)[:room] for text in request.prompts)
    return Work(
        prompts=prompts,
        num_tokens=request.num_tokens,
        concurrency=request.concurrency,
        rounds=request.rounds,
        budget_s=request.budget_s,
    )


def _measured(
    runners: Mapping[str, Callable[[], Runner]],
    work: Work,
    request: CompareRequest,
    progress: Progress,
    clock: Callable[[], float],
) -> dict[str, Samples]:
    progress.begin("measure")
    started = clock()
    samples = measure_in_processes(
        runners,
        work,
        rng=random.Random(request.seed),
        clock=clock,
        watch=progress.advance,
    )
    progress.end("measure", clock() - started)
    return samples


def _rows(
    request: CompareRequest,
    sides: Sequence[Side],
    baseline: str,
    samples: Mapping[str, Samples],
    parted: Mapping[str, Divergence | None],
    work: Work,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[int, ...]],
) -> tuple[Row, ...]:
    programs = {side.name: stored_program(side.artifact) for side in sides}
    reference = _reference(sides, baseline)
    judged = qualities(programs, reference, texts)
    layers = layer_errors(programs, reference, texts[:2])
    rows: list[Row] = []
    for side in sides:
        own, base = samples[side.name], samples[baseline]
        rows.append(
            Row(
                name=side.name,
                values=_values(side, own, judged[side.name], request, work),
                ratios=_ratios(own, base, request.seed),
                layers=layers[side.name],
                divergence=parted[side.name],
                texts=_texts(tokenizer, work, parted[side.name]),
                latencies=_latencies(own),
                executor=own.facts.executor,
                recipe=side.artifact.manifest.recipe.name,
                decisions=sum(len(record.decisions) for record in side.artifact.manifest.history),
            )
        )
    return tuple(rows)


def _values(
    side: Side, own: Samples, quality: Quality, request: CompareRequest, work: Work
) -> dict[str, float]:
    summary = summarise(side.artifact)
    ttft, tpot = statistics.median(own.ttft_s), statistics.median(own.tpot_s)
    prompt_tokens = statistics.median(len(prompt) for prompt in work.prompts)
    throughput = 1.0 / statistics.median(own.batch_s)
    values = {
        "bits_per_weight": summary.bits_per_weight,
        "size_bytes": float(summary.size_bytes),
        "peak_bytes": float(own.facts.peak_bytes),
        "load_s": own.facts.load_s,
        "perplexity": quality.perplexity,
        "kl_mean": quality.kl_mean,
        "kl_p99": quality.kl_p99,
        "same_top": quality.same_top,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "prefill_tokens_per_s": prompt_tokens / ttft if ttft else math.nan,
        "decode_tokens_per_s": 1.0 / tpot if tpot else math.nan,
        "throughput_tokens_per_s": throughput,
    }
    if request.ttft_limit_s is not None or request.tpot_limit_s is not None:
        values["goodput_per_s"] = _goodput(own, request)
    if request.price_per_hour is not None:
        values["cost_per_million"] = request.price_per_hour / 3600 / throughput * 1e6
    return values


def _latencies(own: Samples) -> dict[str, tuple[float, ...]]:
    singles = [single for singles in own.singles for single in singles]
    return {
        "ttft_s": tuple(sorted(single.ttft_s for single in singles)),
        "tpot_s": tuple(sorted(single.tpot_s for single in singles)),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of sorted values; a percentile is the smallest value that so many do not exceed."""
    return {f"p{p}": values[max(0, math.ceil(p * len(values) / 100) - 1)] for p in (50, 90, 99)}


def _goodput(own: Samples, request: CompareRequest) -> float:
    good = sum(
        (request.ttft_limit_s is None or ttft <= request.ttft_limit_s)
        and (request.tpot_limit_s is None or tpot <= request.tpot_limit_s)
        for batch in own.batches
        for ttft, tpot in batch.times
    )
    return good / sum(batch.wall_s for batch in own.batches)


def _ratios(own: Samples, base: Samples, seed: int) -> dict[str, Ratio]:
    if own is base:
        return dict.fromkeys(MEASURED, Ratio(ratio=1.0, low=1.0, high=1.0))
    return side_ratios(own, base, rng=random.Random(seed))


def _sequences(
    request: CompareRequest, tokenizer: Tokenizer, limit: int, vocab_size: int
) -> list[tuple[int, ...]]:
    texts = PROBE_TEXTS if request.data is None else _read(request.data)
    sequences: list[tuple[int, ...]] = []
    left = _QUALITY_TOKENS
    for text in texts:
        ids = tuple(token for token in tokenizer.encode(text) if token < vocab_size)[: min(limit, left)]
        if len(ids) > 1:
            sequences.append(ids)
            left -= len(ids)
        if left < 2:
            break
    if not sequences:
        raise _no_samples("data", 0)
    return sequences


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "compare.data",
            f"The text {str(path)!r} cannot be read.",
            f"{error}.",
            "Name a file of UTF-8 text, its documents separated by <|endoftext|> or not at all.",
        ) from error
    return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]


def _texts(tokenizer: Tokenizer, work: Work, parted: Divergence | None) -> tuple[str, str, str]:
    """The common text's end, and both continuations."""
    if parted is None:
        return ("", "", "")
    prompt = tokenizer.decode(work.prompts[parted.prompt])
    return (prompt, tokenizer.decode(parted.continuation), tokenizer.decode(parted.baseline_continuation))


def _front(rows: Sequence[Row]) -> tuple[str, ...]:
    """Rows that none beats in quality, size and speed at once; a speed within noise of the baseline's is the
    baseline's."""

    def point(row: Row) -> tuple[float, ...]:
        ratio = row.ratios.get("tpot_s")
        speed = 1.0 if ratio is None or not ratio.is_different else ratio.ratio
        return (row.values["kl_mean"], row.values["size_bytes"], speed)

    return pareto({row.name: point(row) for row in rows})


def columns_of(comparison: Comparison) -> list[Column]:
    """The columns that any row has a number for, in order."""
    return [column for column in COLUMNS if any(column.key in row.values for row in comparison.rows)]


def _no_samples(name: str, value: object) -> UsageError:
    return UsageError(
        "compare.samples",
        f"Nothing can be measured: {name} is {value}.",
        "A comparison needs prompts, at least two tokens each, one round and some time.",
        "Choose larger numbers, or leave the option out.",
    )
