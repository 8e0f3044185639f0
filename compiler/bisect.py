"""Names the first pass of a pipeline whose result differs from what its contract promises, and the node.

Runs every pass once, and the programs between them only as halving asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.program import Program
from ..ir.verify import verify
from ..passes.base import Contract, Exact, Lossy, Pass, PassContext, PassReport, Within
from ..passes.manager import run_passes
from ..passes.probe import logits_of, probe_sequences
from ..spec.errors import LlmcError
from .suspects import Suspect, first_difference, first_lossy_difference, logits_error

# An exact pass changes no bit; comparing nodes asks for a number.
_EXACT = 0.0
# Nodes round more than logits do; and where a difference enters it is not much smaller than where it ends.
_NODE_FACTOR, _NODE_SHARE = 10.0, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a bisection found: `pass_name` is empty where every pass kept its contract.

    `index` counts passes from 0; `contract` is in words; `error` is `max|a - b| / max|a|` of the logits;
    `runs` says how often whole programs were run to find out; `before` and `after` are the programs around
    the pass.
    """

    pass_name: str
    index: int
    contract: str
    why: str
    suspect: Suspect | None
    error: float
    runs: int
    passes: tuple[str, ...]
    before: Program | None = None
    after: Program | None = None

    @property
    def is_clean(self) -> bool:
        """Whether no pass is to blame."""
        return not self.pass_name

    def as_dict(self) -> dict[str, Any]:
        """The object that `llmc bisect --json` prints."""
        return {
            "ok": self.is_clean,
            "pass": self.pass_name,
            "index": self.index,
            "contract": self.contract,
            "why": self.why,
            "suspect": None if self.suspect is None else asdict(self.suspect),
            "error": self.error,
            "runs": self.runs,
            "passes": self.passes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One pass as it ran: the program it returned, and the contract it was held to."""

    pass_: Pass
    after: Program
    contract: Contract


def bisect_passes(
    program: Program,
    passes: Sequence[Pass],
    context: PassContext,
    sequences: Sequence[Sequence[int]] | None = None,
) -> Verdict:
    """Run `passes` on `program`, whose weights must have values, and judge each by its contract on
    `sequences` (a few random ones by default).

    A run of exact passes is halved: only where its last program differs from its first are those between
    them run. A pass that trades accuracy is judged alone, node by node, against rounding to nearest.
    """
    probe = sequences or probe_sequences(program.spec, context.seed)
    steps: list[_Step] = []
    names = tuple(pass_.name for pass_ in passes)
    current = program
    for index, pass_ in enumerate(passes):
        try:
            seen = _Reports()
            current = run_passes(current, (pass_,), context, (seen,))
            verify(current)
        except LlmcError as error:
            found = _Judge(program, steps, probe).verdict(names)
            if not found.is_clean:
                return found
            return Verdict(
                pass_name=pass_.name,
                index=index,
                contract=_in_words(pass_.contract),
                why=f"{error.what} {error.why}",
                suspect=None,
                error=float("inf"),
                runs=found.runs,
                passes=names,
            )
        steps.append(_Step(pass_=pass_, after=current, contract=seen.contract or pass_.contract))
    return _Judge(program, steps, probe).verdict(names)


class _Reports:
    """An instrument that remembers the contract of the last report."""

    def __init__(self) -> None:
        self.contract: Contract | None = None

    def before(self, pass_: Pass, program: Program) -> None:
        """Nothing."""

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> None:
        """Remember it."""
        self.contract = report.contract


class _Judge:
    """Finds the first step that breaks its contract. Programs are numbered: 0 is the traced one, i + 1 what
    step i returned."""

    def __init__(self, program: Program, steps: Sequence[_Step], probe: Sequence[Sequence[int]]) -> None:
        self._programs = [program, *(step.after for step in steps)]
        self._steps = steps
        self._probe = probe
        self._logits: dict[int, Tensor] = {}

    def verdict(self, names: tuple[str, ...]) -> Verdict:
        """The first broken step, or a clean verdict."""
        start = 0
        for index, step in enumerate(self._steps):
            if isinstance(step.contract, Lossy):
                broken = self._broken_between(start, index)
                if broken is not None:
                    return self._exact_verdict(broken, names)
                suspect = first_lossy_difference(
                    self._programs[index], self._programs[index + 1], self._probe
                )
                if suspect is not None:
                    return self._verdict(index, names, suspect)
                start = index + 1
        broken = self._broken_between(start, len(self._steps))
        if broken is not None:
            return self._exact_verdict(broken, names)
        return Verdict(
            pass_name="",
            index=-1,
            contract="",
            why="Every pass kept its contract.",
            suspect=None,
            error=0.0,
            runs=len(self._logits),
            passes=names,
        )

    def _broken_between(self, start: int, stop: int) -> int | None:
        """The first step in `start <= step < stop` that leaves the logits further off than all contracts
        since `start` allow, or None; halves, taking a difference to stay once it is there."""
        if start == stop or self._holds(start, stop):
            return None
        good, bad = start, stop
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._holds(start, middle):
                good = middle
            else:
                bad = middle
        return good

    def _holds(self, start: int, stop: int) -> bool:
        dtype = self._programs[0].spec.compute_dtype
        allowed = sum(_bound(step.contract, dtype) for step in self._steps[start:stop])
        return logits_error(self._of(start), self._of(stop)) <= allowed

    def _exact_verdict(self, index: int, names: tuple[str, ...]) -> Verdict:
        dtype = self._programs[0].spec.compute_dtype
        before, after = self._programs[index], self._programs[index + 1]
        error = logits_error(self._of(index), self._of(index + 1))
        allowed = max(_NODE_FACTOR * _bound(self._steps[index].contract, dtype), _NODE_SHARE * error)
        suspect = first_difference(before, after, self._probe, allowed)
        return self._verdict(index, names, suspect)

    def _verdict(self, index: int, names: tuple[str, ...], suspect: Suspect | None) -> Verdict:
        step = self._steps[index]
        error = logits_error(self._of(index), self._of(index + 1))
        promise = _in_words(step.contract)
        return Verdict(
            pass_name=step.pass_.name,
            index=index,
            contract=promise,
            why=f"It promises {promise}, and moves the logits by {error:.3g} of the largest.",
            suspect=suspect,
            error=error,
            runs=len(self._logits),
            passes=names,
            before=self._programs[index],
            after=self._programs[index + 1],
        )

    def _of(self, number: int) -> Tensor:
        if number not in self._logits:
            with torch.no_grad():
                self._logits[number] = logits_of(self._programs[number], self._probe)
        return self._logits[number]


def _bound(contract: Contract, dtype: str) -> float:
    return contract.bound(dtype) if isinstance(contract, Within) else _EXACT


def _in_words(contract: Contract) -> str:
    if isinstance(contract, Exact):
        return "to change no bit"
    if isinstance(contract, Within):
        return f"to stay within {contract.tolerance:g}"
    return "to lose no more than rounding does"
