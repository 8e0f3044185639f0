"""A search from start to end: its request checked, its study opened, recipes of one model judged in a process
of their own."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...artifact.schema import MANIFEST
from ...codegen.base import default_target
from ...spec.errors import UsageError
from ...spec.target import parse_target
from ..cache.session import CompileCache
from ..compare.made import WRITING_ROOMS, code_digest
from ..compare.sides import open_cache
from ..ledger import Progress, Silent
from ..quality import PROBE_TEXTS
from ..source import find_model
from .evaluator import Setting
from .remote import RemoteEvaluator
from .search import Findings, Search
from .space import search_space
from .study import Study
from .trial import Limits

# A trial that is running when the budget is over is ended after this many seconds.
MARGIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to search for. `budget_s` is of the search, `rounds_s` of one recipe's rounds, in seconds;
    `study` (default: in the compile cache's folder) is gone on with; recipes are written into `out`."""

    model: str
    budget_s: float
    out: Path
    limits: Limits = field(default_factory=Limits)
    study: Path | None = None
    target: str | None = None
    dtype: str | None = None
    prompts: tuple[str, ...] = PROBE_TEXTS[:3]
    num_tokens: int = 32
    concurrency: int = 4
    rounds: int = 20
    rounds_s: float = 10.0
    num_threads: int = 0
    price_per_hour: float | None = None
    seed: int = 0

    def validate(self) -> None:
        """Raises UsageError for numbers that no work can be done with, and for what is no model."""
        self.limits.validate()
        least = {"budget_s": 0, "rounds_s": 0, "rounds": 1, "num_tokens": 1, "concurrency": 0}
        for name, low in least.items():
            if not getattr(self, name) > low:
                raise UsageError(
                    "search.samples",
                    f"Nothing can be measured: {name} is {getattr(self, name)}.",
                    f"It must be above {low}.",
                    "Choose a larger number, or leave the option out.",
                )
        if not self.prompts or not all(self.prompts):
            raise UsageError(
                "search.samples", "A prompt is empty.", "Nothing can be measured on it.", "Leave it out."
            )
        if (Path(self.model) / MANIFEST).is_file():
            raise UsageError(
                "search.model",
                f"{self.model!r} is an artifact.",
                "A search compiles recipes itself.",
                "Name the model that it was made from.",
            )

    def setting(self) -> Setting:
        """What every recipe is judged under."""
        return Setting(
            model=self.model,
            target=self.target or default_target(),
            dtype=self.dtype,
            prompts=self.prompts,
            num_tokens=self.num_tokens,
            concurrency=self.concurrency,
            rounds=self.rounds,
            rounds_s=self.rounds_s,
            num_threads=self.num_threads,
            price_per_hour=self.price_per_hour,
            seed=self.seed,
        )


def run_search(
    request: SearchRequest,
    *,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Findings:
    """Search as `request` says; over after its budget and `MARGIN_S` seconds at most.

    Raises UsageError for numbers that cannot be meant, a study of something else or in use, and without
    Optuna; ModelError for a model that cannot be compiled at all.
    """
    request.validate()
    folder = find_model(request.model)
    setting = request.setting()
    space = search_space(parse_target(setting.target).kind)
    with open_cache() as cache:
        facts = _facts(request, setting, folder, cache)
        path = request.study or _default_study(cache.store.config.folder, folder, facts)
    with Study(path, space, facts, seed=request.seed) as study, RemoteEvaluator(setting) as evaluator:
        search = Search(
            study=study,
            space=space,
            evaluator=evaluator,
            limits=request.limits,
            budget_s=request.budget_s,
            margin_s=MARGIN_S,
            rounds_s=request.rounds_s,
            clock=clock,
        )
        return search.run(request.out, progress or Silent())


def _facts(request: SearchRequest, setting: Setting, folder: Path, cache: CompileCache) -> dict[str, str]:
    """All that a trial's numbers and its pruning depend on."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    digests = repr([(path.name, cache.file_digest(path)) for path in files])
    work = {name: value for name, value in asdict(setting).items() if name not in ("model", "target")}
    return {
        "model": _short(digests),
        "target": setting.target,
        "limits": json.dumps(request.limits.given(), sort_keys=True),
        "work": _short(json.dumps(work, sort_keys=True)),
        "llmc": code_digest((*WRITING_ROOMS, "runtime"))[:12],
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _default_study(cache_folder: Path, model: Path, facts: dict[str, str]) -> Path:
    return cache_folder / "studies" / f"{model.name}-{_short(json.dumps(facts, sort_keys=True))}.json"
