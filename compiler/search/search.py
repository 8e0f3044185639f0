"""A search over recipes: asked, pruned by what is cheap, measured, and what remains on the front.

Knows trials, limits and the budget; how a recipe is judged is the evaluator's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...passes.recipes import Recipe, check_recipe, to_yaml
from ...spec.errors import LlmcError, UsageError
from ..compare.statistics import pareto
from ..ledger import Progress
from .costs import Costs
from .space import Params, Space, recipe_of
from .study import Study
from .trial import JUDGE, MEASURE, MEASURED, PRUNED, REFUSED, UNFINISHED, Limits, Trial, told_slowness

# What is left of the budget must at least do for the writing of recipes.
_LAST_S = 0.5
# Few prompts tell a divergence this well: one so far beyond a limit is beyond it on more text too.
_PROXY_SLACK = 1.5
# No speed makes up for this many times the divergence of a recipe that takes no more bytes.
_HOPELESS = 4.0
_LEAST_KL = 1e-4
# The violation of what cannot be compiled at all: worse than any limit that is broken by little.
_REFUSED = 10.0


class OutOfTime(Exception):
    """A stage was ended because its time was over."""


class Judgement(NamedTuple):
    """What is known of a compiled recipe before it is timed: mean KL divergence in nats on few tokens, and a
    digest of all that runs: equal digests are one configuration."""

    kl_mean: float
    digest: str


class Evaluator(Protocol):
    """Judges recipes, dearer from method to method. Each raises OutOfTime when `timeout_s` seconds are over,
    and what compiling raises."""

    def prepare(self, timeout_s: float) -> None:
        """Everything that all trials share. Asked for once, before anything else."""
        ...

    def size_bytes(self, recipe: Recipe, timeout_s: float) -> int:
        """Bytes of all weights, from the config alone."""
        ...

    def judge(self, recipe: Recipe, timeout_s: float) -> Judgement:
        """Compiled, and run on few tokens."""
        ...

    def measure(self, recipe: Recipe, timeout_s: float) -> Mapping[str, float]:
        """`size_bytes`, `kl_mean`, `slowness`, `ttft_s`, `tpot_s` and more, of its artifact."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a search ends with: all trials, and of the front (within limits) names and written recipes.
    `ended` says why it ended: `exhausted` (nothing untried is left) or `budget`."""

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    recipes: Mapping[str, Path]
    limits: Limits
    num_new: int
    ended: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc compare --search --json` prints."""
        return {
            "trials": [asdict(trial) | {"beyond": self.beyond(trial)} for trial in self.trials],
            "front": [trial.name for trial in self.front],
            "recipes": {name: str(path) for name, path in self.recipes.items()},
            "limits": asdict(self.limits),
            "new_trials": self.num_new,
            "ended": self.ended,
            "seconds": self.seconds,
        }

    def beyond(self, trial: Trial) -> tuple[str, ...]:
        """The limits that a trial was measured to break."""
        return tuple(self.limits.broken(trial.values)) if trial.state == MEASURED else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search. `budget_s` and `margin_s` are seconds: no trial begins that is not expected to end within
    the budget, and one that runs is ended when budget and margin are over. `rounds_s` is what the rounds of
    one measurement may take."""

    study: Study
    space: Space
    evaluator: Evaluator
    limits: Limits
    budget_s: float
    margin_s: float
    rounds_s: float
    clock: Callable[[], float]

    def run(self, recipes: Path, progress: Progress) -> Findings:
        """Try recipes until the budget does for no other or none is left; write those of the front into the
        folder `recipes`. Ended early, by an exception or a signal, the study holds all finished trials and a
        next search goes on from there."""
        started = self.clock()
        before = len(self.study.trials)
        ended = self._try_all(started, progress)
        front = front_of(self.study.trials, self.limits)
        return Findings(
            trials=tuple(self.study.trials),
            front=front,
            recipes=_write_recipes(front, self.space, recipes),
            limits=self.limits,
            num_new=len(self.study.trials) - before,
            ended=ended,
            seconds=self.clock() - started,
        )

    def _try_all(self, started: float, progress: Progress) -> str:
        def left() -> float:
            return started + self.budget_s - _LAST_S - self.clock()

        progress.begin("prepare")
        try:
            self.evaluator.prepare(left() + self.margin_s)
        except OutOfTime:
            return "budget"
        costs = Costs(prepare_s=self.clock() - started, rounds_s=self.rounds_s)
        progress.end("prepare", costs.prepare_s)
        while True:
            trials = self.study.trials
            room = left()
            params = self.study.ask(lambda params: costs.trial_s(params, trials) <= room)  # noqa: B023
            if params is None:
                return "budget" if any(True for _ in self.study.untried()) else "exhausted"
            recipe = recipe_of(self.space, params)
            progress.begin(f"try {recipe.name}")
            began = self.clock()
            trial = _Judging(self, costs, left).judge(recipe, params)
            self.study.tell(trial)
            progress.end(f"{recipe.name}: {trial.state}", self.clock() - began)
            if trial.state == UNFINISHED:
                return "budget"


class _Judging:
    """One trial, stage by stage."""

    def __init__(self, search: Search, costs: Costs, left: Callable[[], float]) -> None:
        self._search, self._costs, self._left = search, costs, left
        self._values: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._digest = ""

    def judge(self, recipe: Recipe, params: Params) -> Trial:
        """The trial's outcome."""

        def ended(state: str, reason: str, violation: float = 0.0) -> Trial:
            return Trial(
                name=recipe.name,
                params=dict(params),
                state=state,
                reason=reason,
                values=self._values,
                seconds=self._seconds,
                violation=violation,
                digest=self._digest,
            )

        try:
            check_recipe(recipe)
            pruned = self._cheap(recipe)
            if pruned is not None:
                return ended(PRUNED, pruned.reason, pruned.violation)
            if self._costs.measure_s(params, self._search.study.trials) > self._left():
                return ended(UNFINISHED, "there is no time left to measure it")
            self._timed(MEASURE, lambda timeout_s: self._measure(recipe, timeout_s))
        except OutOfTime:
            return ended(UNFINISHED, "its time was over")
        except LlmcError as error:
            return ended(REFUSED, f"{error.what} {error.why}", _REFUSED)
        return ended(MEASURED, "", sum(self._search.limits.broken(self._values).values()))

    def _cheap(self, recipe: Recipe) -> _Pruned | None:
        """Size from the config alone, then the divergence on few tokens."""
        limits, values = self._search.limits, self._values
        size = float(self._search.evaluator.size_bytes(recipe, self._timeout()))
        values |= {"estimated_bytes": size, "size_bytes": size}
        if "size" in limits.broken(values):
            reason = "its weights alone are larger than the limit"
            return _Pruned(reason, limits.broken(values)["size"])
        self._timed(JUDGE, lambda timeout_s: self._compile(recipe, timeout_s))
        if not math.isfinite(values["kl_mean"]):
            values.pop("kl_mean")
            return _Pruned("its logits on the probe prompts are not finite", _REFUSED)
        if limits.kl is not None and values["kl_mean"] > _PROXY_SLACK * limits.kl:
            reason = "it diverges beyond the limit on the probe prompts already"
            return _Pruned(reason, limits.broken(values)["kl"])
        return self._needless()

    def _needless(self) -> _Pruned | None:
        """Why a measured trial makes measuring this one needless."""
        for rival in self._search.study.trials:
            if rival.state != MEASURED:
                continue
            if rival.digest == self._digest:
                return _Pruned(f"it compiles to the same as {rival.name}", rival.violation)
            times = self._values["kl_mean"] / max(_LEAST_KL, rival.values["kl_mean"])
            is_larger = rival.values["estimated_bytes"] <= self._values["estimated_bytes"]
            if is_larger and times > _HOPELESS:
                return _Pruned(f"{rival.name} diverges far less and takes no more bytes", times / _HOPELESS)
        return None

    def _compile(self, recipe: Recipe, timeout_s: float) -> None:
        self._values["kl_mean"], self._digest = self._search.evaluator.judge(recipe, timeout_s)

    def _measure(self, recipe: Recipe, timeout_s: float) -> None:
        self._values |= self._search.evaluator.measure(recipe, timeout_s)

    def _timed(self, stage: str, run: Callable[[float], None]) -> None:
        """A stage whose seconds are kept even when it ends early: the least that it takes."""
        began = self._search.clock()
        try:
            run(self._timeout())
        finally:
            self._seconds[stage] = self._search.clock() - began

    def _timeout(self) -> float:
        return max(0.0, self._left()) + self._search.margin_s


class _Pruned(NamedTuple):
    reason: str
    violation: float


def front_of(trials: Sequence[Trial], limits: Limits) -> tuple[Trial, ...]:
    """Measured trials within `limits` that none beats in quality, size and speed at once, most faithful
    first; speeds that noise explains are equal."""
    within = {
        trial.name: trial for trial in trials if trial.state == MEASURED and not limits.broken(trial.values)
    }
    points = {
        name: (trial.values["kl_mean"], trial.values["size_bytes"], told_slowness(trial.values))
        for name, trial in within.items()
    }
    front = [within[name] for name in pareto(points)]
    return tuple(sorted(front, key=lambda trial: trial.values["kl_mean"]))


def _write_recipes(front: Sequence[Trial], space: Space, folder: Path) -> dict[str, Path]:
    written: dict[str, Path] = {}
    try:
        for trial in front:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{trial.name}.yaml"
            path.write_text(to_yaml(recipe_of(space, trial.params)), encoding="utf-8")
            written[trial.name] = path
    except OSError as error:
        raise UsageError(
            "search.out",
            f"Recipes cannot be written to {str(folder)!r}.",
            f"{error.strerror or error}.",
            "Name another folder with --out.",
        ) from error
    return written
