"""What the stages of a compile ask of the cache: traces, and checks that were passed before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ...ir.program import Program
from ...ir.weights import Reader
from .digest import Uncachable
from .session import CompileCache
from .sources import ROOT

_TRACE, _CHECK = "trace", "check"
_TRACING = ("compiler/trace.py",)
_CHECKING = ("compiler/selfcheck.py", "compiler/pipeline.py")


class Recalled(NamedTuple):
    """A program, and whether it was known."""

    program: Program
    cached: bool


def recall_trace(
    cache: CompileCache, config: Mapping[str, Any], settings: Sequence[object], trace: Callable[[], Program]
) -> Recalled:
    """The program that `trace` makes of a model's config under `settings` (dtype, context length)."""
    if not cache.is_on:
        return Recalled(trace(), False)
    key = cache.key(_TRACE, cache.files_digest([ROOT / name for name in _TRACING]), config, tuple(settings))
    known = cache.programs.find(_TRACE, key, {}, Reader())
    cache.store.count(_TRACE, None if known is None else known.seconds)
    if known is not None:
        return Recalled(known.program, True)
    started = cache.clock()
    program = trace()
    try:
        label = f"{program.spec.architecture}, {program.spec.num_layers} layers"
        cache.programs.keep(_TRACE, key, label, program, cache.clock() - started)
    except Uncachable as reason:
        cache.note(f"the trace is not kept: {reason}")
    return Recalled(program, False)


def recall_check(cache: CompileCache, inputs: Sequence[object], check: Callable[[], None]) -> bool:
    """Run `check`, which raises where it fails, unless it passed on equal `inputs`; gives whether it had."""
    if not cache.is_on:
        check()
        return False
    code = cache.files_digest([*(ROOT / name for name in _CHECKING), *sorted(ROOT.glob("ir/ops/*.py"))])
    try:
        key = cache.key(_CHECK, code, tuple(inputs))
    except Uncachable as reason:
        cache.note(f"checks are not remembered: {reason}")
        check()
        return False
    if cache.store.find(_CHECK, key) is not None:
        return True
    started = cache.clock()
    check()
    cache.store.keep(_CHECK, key, "small twin", lambda folder: None, seconds=cache.clock() - started)
    return False
