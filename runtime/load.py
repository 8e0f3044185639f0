"""From a path to a running model: open, verify while loading, check the oracle, start the engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..artifact.checksums import Problem
from ..artifact.oracle import read_oracle
from ..artifact.reader import Artifact, check_files, open_unchecked, raise_damage
from ..artifact.schema import FileKind
from .config import RuntimeConfig
from .draft_loading import attach_draft, check_vocabulary, draft_config, with_draft
from .executors.registry import open_executor
from .llm import LLM
from .proof import check_executor
from .protocol import Executor
from .speculation_costs import measure_costs
from .tokenizer import Tokenizer

# Read before anything is made of them; the rest, which is large, is checked while it is being loaded.
_SMALL: frozenset[FileKind] = frozenset({"program", "kernel", "tokenizer", "oracle", "report"})
_LARGE: frozenset[FileKind] = frozenset({"weights"})


@dataclass(slots=True)
class StartLedger:
    """Where the time of a start went: consecutive steps, so that their seconds add up to the wall clock
    since the ledger was made."""

    clock: Callable[[], float] = time.perf_counter
    steps: dict[str, float] = field(default_factory=dict[str, float])
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def mark(self, step: str) -> None:
        """The time since the last mark, or since the ledger was made, went into `step`."""
        now = self.clock()
        self.steps[step] = self.steps.get(step, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds of all steps."""
        return sum(self.steps.values())


def load(
    path: str | os.PathLike[str],
    config: RuntimeConfig | None = None,
    *,
    draft: str | os.PathLike[str] | None = None,
    ledger: StartLedger | None = None,
) -> LLM:
    """Loads the artifact at `path` and returns it ready to generate. The artifact at `draft`, of a smaller
    model with the same vocabulary, drafts for it: the same tokens, sooner.

    Every byte is checked against its checksum, the weights while the executor loads them, and the model
    must reproduce its oracle. Raises ArtifactError naming what is wrong, TargetError when this machine
    cannot run it, UsageError for settings that do not fit. `ledger` is filled with seconds by step.
    """
    config = with_draft(config or RuntimeConfig(), draft)
    config.validate()
    ledger = ledger or StartLedger()
    artifact, executor = _open(path, config, ledger)
    with _closing_on_error(executor):
        if config.draft is not None:
            draft_artifact, draft_executor = _open(
                config.draft, draft_config(config, executor), ledger, "draft "
            )
            with _closing_on_error(draft_executor):
                check_vocabulary(artifact, draft_artifact)
                attach_draft(executor, draft_executor)
        has_tokenizer = bool(artifact.manifest.of_kind("tokenizer"))
        tokenizer = Tokenizer.from_folder(artifact.tokenizer_folder) if has_tokenizer else None
        ledger.mark("tokenizer")
        costs = measure_costs(executor, config) if config.speculation != "none" else None
        manifest = artifact.manifest
        llm = LLM(executor, tokenizer, manifest.spec, config, costs=costs, digest=manifest.checksum)
        ledger.mark("engine")
    return llm


def _open(
    path: str | os.PathLike[str], config: RuntimeConfig, ledger: StartLedger, name: str = ""
) -> tuple[Artifact, Executor]:
    """An artifact whose every byte was checked, with an executor that reproduces its oracle."""
    artifact = open_unchecked(path)
    raise_damage(artifact, check_files(artifact, _SMALL))
    ledger.mark(f"{name}open")
    with _checking_weights(artifact) as checked:
        executor = open_executor(artifact, config)
        ledger.mark(f"{name}load")
        with _closing_on_error(executor):
            raise_damage(artifact, checked.result())
    with _closing_on_error(executor):
        ledger.mark(f"{name}verify")
        check_executor(executor, read_oracle(artifact))
        ledger.mark(f"{name}oracle")
    return artifact, executor


@contextmanager
def _checking_weights(artifact: Artifact) -> Generator[Future[list[Problem]], None, None]:
    """Checks the weights in the background. Whatever else fails meanwhile, damage is the reason told."""
    with ThreadPoolExecutor(1, "llmc-verify") as pool:
        checked = pool.submit(check_files, artifact, _LARGE)
        try:
            yield checked
        except Exception:
            raise_damage(artifact, checked.result())
            raise


@contextmanager
def _closing_on_error(executor: Executor) -> Generator[None, None, None]:
    try:
        yield
    except BaseException:
        executor.close()
        raise
