"""What watches passes from outside: time, dumps, verification, the numeric contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..ir.printer import print_program
from ..ir.program import Program
from ..ir.verify import verify
from ..spec.errors import CheckFailed, InternalError
from .base import Contract, Exact, Pass, PassReport, Within
from .probe import logits_of, probe_sequences


class PassTime(NamedTuple):
    """How long one pass took, and how much it matched."""

    name: str
    seconds: float
    matches: int


class Timing:
    """Seconds spent in each pass, by the clock given (seconds, monotonic)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.times: list[PassTime] = []
        self._clock = clock
        self._started = 0.0

    def before(self, pass_: Pass, program: Program) -> None:
        """Start the clock."""
        self._started = self._clock()

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> None:
        """Stop it."""
        self.times.append(PassTime(pass_.name, self._clock() - self._started, report.matches))


class TextDump:
    """The program as text after each pass, and before the first, in files `NN-pass.txt` of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def before(self, pass_: Pass, program: Program) -> None:
        """Write what the first pass is given."""
        if self._count == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write("input", program)

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> None:
        """Write what the pass returned."""
        self._write(pass_.name, after)

    def _write(self, title: str, program: Program) -> None:
        path = self._folder / f"{self._count:02d}-{title}.txt"
        path.write_text(print_program(program), encoding="utf-8")
        self._count += 1


class Verification:
    """The rules of the intermediate representation, after each pass."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Nothing: the program before was the result of the pass before."""

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> None:
        """Raises InternalError naming the pass and the rule it broke."""
        try:
            verify(after)
        except InternalError as error:
            raise InternalError(
                error.code, f"Pass {pass_.name!r} returned an invalid program.", error.why, error.fix
            ) from error


class NumericContract:
    """Each pass's logits on a probe batch against those before it, judged by its contract.

    Weights must have values. `sequences` are the probe; without them a few random ones are drawn
    from `seed`.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | None = None, seed: int = 0) -> None:
        self._sequences = sequences
        self._seed = seed
        self._known: tuple[Program, Tensor] | None = None

    def before(self, pass_: Pass, program: Program) -> None:
        """Measure the program before, unless it is the one measured last."""
        if self._known is None or not _computes_the_same(self._known[0], program):
            self._known = (program, self._logits(program))

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> float:
        """The largest absolute logit difference. Raises CheckFailed when the contract is broken."""
        assert self._known is not None
        expected = self._known[1]
        if _computes_the_same(before, after):
            self._known = (after, expected)
            return 0.0
        found = self._logits(after)
        contract = report.contract or pass_.contract
        judge(pass_.name, contract, expected, found, before.spec.compute_dtype)
        self._known = (after, found)
        return float((found.double() - expected.double()).abs().max())

    def _logits(self, program: Program) -> Tensor:
        sequences = self._sequences or probe_sequences(program.spec, self._seed)
        return logits_of(program, sequences)


def _computes_the_same(one: Program, other: Program) -> bool:
    return one.graph is other.graph and all(
        one.weights[name] is other.weights[name] for name in one.used_weights()
    )


def judge(name: str, contract: Contract, expected: Tensor, found: Tensor, compute_dtype: str) -> None:
    """Hold the logits of pass `name` to `contract`. Raises CheckFailed naming the first value that is off."""
    finite = found.isfinite() | ~expected.isfinite()
    if not bool(finite.all()):
        raise _broken(name, "keeps logits finite", expected, found, ~finite)
    if isinstance(contract, Exact):
        differs = (expected != found) & ~(expected.isnan() & found.isnan())
        if bool(differs.any()):
            raise _broken(name, "changes no bit", expected, found, differs)
    if isinstance(contract, Within):
        bound = contract.bound(compute_dtype)
        scale = float(expected.double().abs().max())
        differs = (expected.double() - found.double()).abs() > bound * scale
        if bool(differs.any()):
            raise _broken(name, f"stays within {bound:.3g} of the largest logit", expected, found, differs)


def _broken(name: str, promise: str, expected: Tensor, found: Tensor, differs: Tensor) -> CheckFailed:
    row, column = (int(index) for index in torch.nonzero(differs)[0])
    was, became = float(expected[row, column]), float(found[row, column])
    return CheckFailed(
        "passes.contract",
        f"Pass {name!r} breaks its numeric contract: it {promise}.",
        f"{int(differs.sum())} logits of the probe differ, the first at token {row}, "
        f"entry {column}: {was:.9g} before, {became:.9g} after.",
        f"Report this defect of {name!r}; leaving the pass out of the recipe avoids it.",
    )
