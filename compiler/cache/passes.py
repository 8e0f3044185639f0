"""Passes that take up where an earlier compile left off: the longest known prefix is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ...ir.document import encode_program
from ...ir.program import Program
from ...passes.base import Pass, PassContext
from ...passes.instruments import Timing
from ...passes.manager import Instrument, run_passes
from ..result import PassSummary
from .codec import stored_sources
from .digest import Uncachable
from .session import CompileCache
from .sources import ROOT

Result = TypeVar("Result")

_KIND = "pass"

# What every pass's result depends on, beside the pass itself.
MANAGER = ("passes/manager.py", "passes/instruments.py", "ir/infer.py", "ir/document.py")


def program_content(program: Program) -> tuple[object, ...]:
    """All that tells a program from others, for a key of the cache."""
    weights = {name: program.weights[name] for name in program.weights}
    return (encode_program(program), program.spec, dict(program.weights.ties)), weights


class CachedPasses:
    """Runs passes on what a checkpoint was bound to; a program's key is that of all that led to it.

    `watch` names what the instruments measure and record, since records are part of the result; with None
    every pass runs. A pass or context that cannot be told by content ends the keeping there, with a note.
    """

    def __init__(self, cache: CompileCache, bound: Program, context: PassContext, watch: str | None) -> None:
        self._cache = cache
        self._context = context
        self._reader = bound.weights.reader
        self._files: dict[str, str] = {}
        self.outcomes: list[PassSummary] = []
        self._spent_s = 0.0
        known = cache.is_on and watch is not None
        self._key = self._noted(lambda: self._first_key(bound, str(watch))) if known else None

    def run(self, program: Program, passes: Sequence[Pass], instruments: Sequence[Instrument]) -> Program:
        """`program`, which the last call returned or the cache was opened on, after all of `passes`."""
        keys = self._keys(passes)
        start, program = self._longest_prefix(program, passes, keys)
        for pass_, key in zip(passes[start:], keys[start:], strict=True):
            if key is not None:
                self._cache.store.count(_KIND, None)
            started = time.perf_counter()
            timing = Timing(time.perf_counter)
            program = run_passes(program, (pass_,), self._context, (timing, *instruments))
            (ran,) = timing.times
            self.outcomes.append(PassSummary(name=ran.name, seconds=ran.seconds, matches=ran.matches))
            self._spent_s += time.perf_counter() - started
            self._keep(key, pass_, program)
        self._key = keys[-1] if keys else self._key
        return program

    def _first_key(self, bound: Program, watch: str) -> str:
        code = self._cache.files_digest([ROOT / name for name in MANAGER] + sorted(ROOT.glob("ir/ops/*.py")))
        key = self._cache.key("passes", code, watch, *program_content(bound), self._context)
        weights = (bound.weights[name] for name in bound.weights)
        for path in {source.path for source in stored_sources(weights)}:
            self._files[self._cache.file_digest(Path(path))] = path
        return key

    def _keys(self, passes: Sequence[Pass]) -> list[str | None]:
        keys: list[str | None] = []
        key = self._key
        for pass_ in passes:
            key = self._noted(lambda pass_=pass_, key=key: self._next_key(key, pass_)) if key else None
            keys.append(key)
        return keys

    def _next_key(self, key: str | None, pass_: Pass) -> str:
        return self._cache.key("pass", key, pass_)

    def _longest_prefix(
        self, program: Program, passes: Sequence[Pass], keys: Sequence[str | None]
    ) -> tuple[int, Program]:
        for index in range(len(passes) - 1, -1, -1):
            key = keys[index]
            if key is None or not self._cache.store.has(_KIND, key):
                continue
            kept = self._cache.programs.find(_KIND, key, self._files, self._reader)
            if kept is not None:
                done = kept.program.history[len(program.history) :]
                self.outcomes += [
                    PassSummary(name=record.name, seconds=0.0, matches=record.matches, cached=True)
                    for record in done
                ]
                saved_s = (kept.seconds - self._spent_s) / len(done)
                for _ in done:
                    self._cache.store.count(_KIND, saved_s)
                self._spent_s = kept.seconds
                return index + 1, kept.program
        return 0, program

    def _keep(self, key: str | None, pass_: Pass, program: Program) -> None:
        """Keep `program`, with what all passes up to this one took."""
        if key is not None:
            label = f"{pass_.name} of {program.spec.architecture}, {program.spec.num_layers} layers"
            keep = self._cache.programs.keep
            self._noted(lambda: keep(_KIND, key, label, program, self._spent_s, self._files))

    def _noted(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except Uncachable as reason:
            self._cache.note(f"results of passes are not kept: {reason}")
            return None
