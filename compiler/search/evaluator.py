"""Recipes judged on a real model: estimated from the config, compiled, run beside the unquantised one."""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from ...artifact.reader import Artifact
from ...artifact.summary import summarise
from ...passes.probe import logits_of
from ...passes.recipes import preset_recipe, read_recipe
from ...runtime.tokenizer import Tokenizer
from ...spec.errors import UsageError
from ...spec.target import parse_target
from ..cache.session import CompileCache
from ..checkpoint import parse_dtype
from ..compare.made import ORIGINAL, compile_side
from ..compare.measure import Work, measure_sides, side_ratios
from ..compare.quality import stored_program
from ..compare.runner import Runner, WorkerRunner
from ..estimate import Estimator
from ..ledger import Silent
from ..quality import PROBE_TEXTS, compare
from ..source import find_model
from .search import Judgement

_NUM_QUICK = 2
_REFERENCE = "reference"
_PLAIN = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every recipe is judged under. `rounds_s` seconds and `rounds` bound the timing of one; `verify`
    and `overrides` are those of compiling."""

    model: str
    target: str
    dtype: str | None = None
    prompts: tuple[str, ...] = PROBE_TEXTS[:3]
    num_tokens: int = 32
    concurrency: int = 4
    rounds: int = 20
    rounds_s: float = 10.0
    num_threads: int = 0
    price_per_hour: float | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()


class ModelEvaluator:
    """Judges recipes of one model, given as YAML. The unquantised model for the same target runs in a process
    of its own until the end, and each recipe beside it, interleaved."""

    def __init__(self, setting: Setting, cache: CompileCache) -> None:
        """Compiles the original. Raises what compiling raises, and UsageError for more tokens than fit."""
        self._setting, self._cache = setting, cache
        self._last: tuple[str, Artifact] | None = None
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="llmc-search-")))
        folder = find_model(setting.model)
        dtype = None if setting.dtype is None else parse_dtype(setting.dtype)
        self._estimator = Estimator(folder, target=parse_target(setting.target), dtype=dtype)
        plain = self._estimator.estimate(_PLAIN, preset_recipe(_PLAIN).passes)
        room = _prompt_room(setting, plain.max_context)
        reference = compile_side(setting.model, ORIGINAL, _Reference(), cache, Silent())
        self._tokenizer = Tokenizer.from_folder(reference.tokenizer_folder)
        spec = reference.manifest.spec
        self._vocab = spec.vocab_size
        self._work = self._make_work(room)
        self._texts = self._encode(PROBE_TEXTS, spec.max_context)
        program = stored_program(reference)
        self._expected = [logits_of(program, [text]) for text in self._texts]
        self._baseline: Runner = self._stack.enter_context(self._runner(self._compile(_PLAIN)))

    def size_bytes(self, text: str) -> int:
        """Bytes of all weights, from the config alone."""
        recipe = read_recipe(self._written(text))
        return self._estimator.file_bytes(recipe.passes).weights

    def judge(self, text: str) -> Judgement:
        """The divergence on two prompts of the artifact for the target, interpreted."""
        artifact = self._made(text)
        return Judgement(self._kl(artifact, _NUM_QUICK), _digest(artifact))

    def measure(self, text: str) -> dict[str, float]:
        """Everything, of the artifact for the target; `slowness` with the interval that holds it."""
        setting = self._setting
        artifact = self._made(text)
        with self._runner(artifact) as runner:
            samples = measure_sides(
                {"own": runner, "baseline": self._baseline},
                self._work,
                rng=random.Random(setting.seed),
                clock=time.perf_counter,
                watch=lambda done, total, what: None,
            )
        own, base = samples["own"], samples["baseline"]
        ratio = side_ratios(own, base, rng=random.Random(setting.seed)).get("tpot_s")
        if ratio is None:
            raise UsageError(
                "search.samples",
                "No time per token could be measured.",
                "The clock saw none pass.",
                "Make more tokens with --tokens.",
            )
        summary, throughput = summarise(artifact), 1.0 / statistics.median(own.batch_s)
        values = {
            "size_bytes": float(summary.size_bytes),
            "bits_per_weight": summary.bits_per_weight,
            "peak_bytes": float(own.facts.peak_bytes),
            "kl_mean": self._kl(artifact, len(self._texts)),
            "slowness": ratio.ratio,
            "slowness_low": ratio.low,
            "slowness_high": ratio.high,
            "ttft_s": statistics.median(own.ttft_s),
            "tpot_s": statistics.median(own.tpot_s),
            "throughput_tokens_per_s": throughput,
        }
        if setting.price_per_hour is not None:
            values["cost_per_million"] = setting.price_per_hour / 3600 / throughput * 1e6
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _compile(self, recipe: str) -> Artifact:
        return compile_side(self._setting.model, recipe, self._setting, self._cache, Silent())

    def _made(self, text: str) -> Artifact:
        """What was compiled last is kept: a recipe is judged, then measured."""
        if self._last is None or self._last[0] != text:
            self._last = (text, self._compile(str(self._written(text))))
        return self._last[1]

    def _written(self, text: str) -> Path:
        path = self._folder / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def _runner(self, artifact: Artifact) -> WorkerRunner:
        setting = self._setting
        return WorkerRunner(artifact.path, num_threads=setting.num_threads, max_requests=setting.concurrency)

    def _make_work(self, room: int) -> Work:
        setting = self._setting
        return Work(
            prompts=tuple(self._encode(setting.prompts, room)),
            num_tokens=setting.num_tokens,
            concurrency=setting.concurrency,
            rounds=setting.rounds,
            budget_s=setting.rounds_s,
        )

    def _encode(self, texts: tuple[str, ...], room: int) -> list[tuple[int, ...]]:
        return [
            tuple(token for token in self._tokenizer.encode(text) if token < self._vocab)[:room]
            for text in texts
        ]

    def _kl(self, artifact: Artifact, count: int) -> float:
        """Mean over the first `count` probe texts, weighed by tokens."""
        program = stored_program(artifact)
        total, tokens = 0.0, 0
        for text, expected in zip(self._texts[:count], self._expected[:count], strict=True):
            found = compare(expected, logits_of(program, [text]), [text])
            total, tokens = total + found.kl_mean * found.tokens, tokens + found.tokens
        return total / tokens


def _prompt_room(setting: Setting, max_context: int) -> int:
    """The most tokens of a prompt."""
    room = max_context - setting.num_tokens
    if room < 1:
        raise UsageError(
            "search.num_tokens",
            f"{setting.num_tokens} tokens do not fit.",
            f"The model's context is {max_context} tokens, and a prompt needs one at least.",
            "Choose fewer with --tokens.",
        )
    return room


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """How the original is compiled."""

    target: str | None = _REFERENCE
    dtype: str | None = None
    overrides: tuple[str, ...] = ()


def _digest(artifact: Artifact) -> str:
    """Of programs, kernels and weights: what runs, whatever it is called."""
    manifest = artifact.manifest
    entries = [*manifest.of_kind("program"), *manifest.of_kind("kernel"), *manifest.of_kind("weights")]
    files = sorted((entry.path, entry.chunks) for entry in entries)
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]
