"""The compiled forms of one model: those asked for last are kept, and what cannot be compiled in time is
refused. Knows no library."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict

from ..spec.errors import RequestError
from .grammar import Grammar
from .grammar_compiler import GrammarCompiler, Vocabulary
from .grammar_trial import Trial
from .structured import StructuredOutput

_MAX_KEPT = 64
_MAX_KEPT_BYTES = 1 << 20
_NUM_TRIALS = 2


class Grammars:
    """Compiles each form once while it is remembered; refusals are remembered too. A form is first compiled
    in a process beside this one, which is ended after `limit_s`. Thread-safe; a call may take that long."""

    def __init__(self, vocabulary: Vocabulary, limit_s: float) -> None:
        self._compiler = GrammarCompiler(vocabulary)
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, Grammar | RequestError] = OrderedDict()
        self._kept_bytes = 0
        self._all_trials = tuple(Trial(vocabulary, limit_s) for _ in range(_NUM_TRIALS))
        self._trials: queue.LifoQueue[Trial] = queue.LifoQueue()
        for trial in self._all_trials:
            self._trials.put(trial)

    def compile(self, wanted: StructuredOutput) -> Grammar:
        """RequestError saying what in `wanted` cannot be used, or that it is too much to compile; TargetError
        where nothing can be compiled on this machine."""
        known = self._find(wanted)
        if known is None:
            known = self._compile(wanted)
            self._keep(wanted, known)
        if isinstance(known, RequestError):
            raise RequestError(known.code, known.what, known.why, known.fix)
        return known

    def close(self) -> None:
        """Ends the processes and what they do. Idempotent."""
        for trial in self._all_trials:
            trial.interrupt()
        for trial in [self._trials.get() for _ in self._all_trials]:
            trial.close()
            self._trials.put(trial)

    def _find(self, wanted: StructuredOutput) -> Grammar | RequestError | None:
        with self._lock:
            known = self._kept.get(wanted)
            if known is not None:
                self._kept.move_to_end(wanted)
            return known

    def _compile(self, wanted: StructuredOutput) -> Grammar | RequestError:
        self._compiler.load()
        trial = self._trials.get()
        try:
            trial.check(wanted)
        except RequestError as error:
            return error
        finally:
            self._trials.put(trial)
        return self._compiler.compile(wanted)

    def _keep(self, wanted: StructuredOutput, known: Grammar | RequestError) -> None:
        """What a form takes is counted by its source."""
        size = wanted.num_bytes
        with self._lock:
            if wanted in self._kept or size > _MAX_KEPT_BYTES:
                return
            self._kept[wanted] = known
            self._kept_bytes += size
            while len(self._kept) > _MAX_KEPT or self._kept_bytes > _MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.num_bytes
