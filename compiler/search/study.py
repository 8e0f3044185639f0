"""A search's memory: every trial in one JSON file, replayed to Optuna, which proposes the next.

The only file that knows Optuna.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ...passes.base import OptionValue
from ...spec.errors import UsageError
from .space import METHOD, Params, Space
from .trial import MEASURED, UNFINISHED, Trial

OBJECTIVES = ("kl_mean", "size_bytes", "slowness")
_VERSION = 1
_MOST_REPEATS = 20


class Study:
    """Asks and remembers. Each trial is on disk before the next is asked for, and no other search may write
    the file meanwhile. A context manager."""

    def __init__(self, path: Path, space: Space, facts: Mapping[str, str], *, seed: int = 0) -> None:
        """Opens or begins the study in `path`. `facts` say what numbers depend on.

        Raises UsageError for a file that is no study, one of other facts, one that another search is writing,
        and without Optuna.
        """
        self._optuna = _optuna()
        self._path, self._space, self._facts = path, space, dict(facts)
        self._lock = _locked(path)
        try:
            stored = _read(path, self._facts)
        except BaseException:
            self._lock.close()
            raise
        self._random = random.Random(seed + len(stored))
        self._study = self._optuna.create_study(
            directions=["minimize"] * len(OBJECTIVES),
            sampler=self._optuna.samplers.TPESampler(seed=seed + len(stored)),
        )
        self.trials: list[Trial] = []
        self._finished: set[frozenset[tuple[str, OptionValue]]] = set()
        for trial in stored:
            self._learn(trial)

    def untried(self) -> Iterable[Params]:
        """All parameters without a finished trial."""
        return (params for params in self._space.all_params() if self.is_untried(params))

    def is_untried(self, params: Params) -> bool:
        """Whether there is no finished trial of these parameters."""
        return frozenset(params.items()) not in self._finished

    def ask(self, fits: Callable[[Params], bool]) -> Params | None:
        """Untried parameters for which `fits` holds: presets first, then what the sampler proposes, drawn
        blindly where it keeps repeating itself. None when there are none."""
        for params in self._space.first:
            if self.is_untried(params) and fits(params):
                return params
        for _ in range(_MOST_REPEATS):
            asked = self._study.ask()
            params = self._suggest(asked)
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            if self.is_untried(params) and fits(params):
                return params
        left = [params for params in self.untried() if fits(params)]
        return self._random.choice(left) if left else None

    def tell(self, trial: Trial) -> None:
        """Remember the outcome of a trial, on disk first."""
        kept = [known for known in self.trials if known.params != trial.params]
        _write(self._path, self._facts, [*kept, trial])
        self.trials = kept
        self._learn(trial)

    def close(self) -> None:
        """Let others write the file. Idempotent."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _learn(self, trial: Trial) -> None:
        """What was not measured counts as the worst there is, and as beyond a limit: the sampler keeps away
        from the like of it."""
        self.trials.append(trial)
        if trial.state == UNFINISHED:
            return
        self._finished.add(frozenset(trial.params.items()))
        self._study.enqueue_trial(dict(trial.params))
        asked = self._study.ask()
        self._suggest(asked)
        asked.set_constraint("limits", trial.violation)
        measured = [known.values for known in self.trials if known.state == MEASURED]
        worst = {name: max((values[name] for values in measured), default=1.0) for name in OBJECTIVES}
        self._study.tell(asked, [trial.values.get(name, worst[name]) for name in OBJECTIVES])

    def _suggest(self, asked: Any) -> dict[str, OptionValue]:
        method = asked.suggest_categorical(METHOD, list(self._space.methods))
        params: dict[str, OptionValue] = {METHOD: method}
        for axis in self._space.methods[method]:
            params[axis.name] = asked.suggest_categorical(axis.name, list(axis.values))
        return params


def _optuna() -> Any:
    try:
        optuna: Any = import_module("optuna")
    except ModuleNotFoundError as error:
        raise UsageError(
            "search.missing_library",
            "Searching over recipes needs the library optuna.",
            f"The module {error.name!r} is not installed in this environment.",
            "Install it with `pip install 'llmc-compiler[search]'`.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _locked(path: Path) -> IO[str]:
    """A file beside the study, held by this process until it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise _bad_study(path, f"It cannot be written: {error.strerror or error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise _bad_study(path, "Another search is writing it.") from error
    return lock


def _read(path: Path, facts: Mapping[str, str]) -> list[Trial]:
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version, known = stored["version"], stored["facts"]
        if version != _VERSION:
            raise _bad_study(path, f"Its version is {version!r}, and this llmc reads {_VERSION}.")
        trials = [Trial(**trial) for trial in stored["trials"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad_study(path, f"It cannot be read: {error}.") from error
    for name in dict.fromkeys((*facts, *known)):
        if known.get(name) != facts.get(name):
            why = f"It was begun with another {name}: {known.get(name)} and not {facts.get(name)}."
            raise _bad_study(path, why)
    return trials


def _write(path: Path, facts: Mapping[str, str], trials: list[Trial]) -> None:
    """Whole or not at all: a search may be ended at any time."""
    content = {"version": _VERSION, "facts": facts, "trials": [asdict(trial) for trial in trials]}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise _bad_study(path, f"It cannot be written: {error.strerror or error}.") from error


def _bad_study(path: Path, why: str) -> UsageError:
    return UsageError(
        "search.study", f"The study {str(path)!r} cannot be used.", why, "Name another file with --study."
    )
