"""Run passes in order and hold each to what it declared.

Knows facts, stages and expectations; what is timed, dumped, verified or measured is an instrument's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ..ir.infer import infer
from ..ir.program import Program
from ..spec.errors import RecipeError
from ..spec.history import PassRecord
from .base import TRACED, Pass, PassContext, PassReport, Stage, option_values


class Instrument(Protocol):
    """Something that watches passes from outside. It changes neither program nor report."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Called just before a pass runs."""
        ...

    def after(self, pass_: Pass, before: Program, after: Program, report: PassReport) -> float | None:
        """Called on the inferred result of a pass; raises to reject it.

        Returns the largest absolute logit difference when it measured one, to be recorded.
        """
        ...


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    context: PassContext,
    instruments: Sequence[Instrument] = (),
) -> Program:
    """`program` after all of `passes`, its facts and history extended.

    Raises RecipeError when the passes do not fit together or one matches less than the recipe
    expects, and whatever a pass or an instrument raises.
    """
    check_order(passes, program.facts)
    infer(program)
    for pass_ in passes:
        program = _run_one(program, pass_, context, instruments)
    return program


def _run_one(
    before: Program, pass_: Pass, context: PassContext, instruments: Sequence[Instrument]
) -> Program:
    for instrument in instruments:
        instrument.before(pass_, before)
    result = pass_.run(before, context)
    _check_expectation(pass_, result.report)
    after = result.program
    after = after.replace(
        weights=after.weights.restricted_to(after.used_weights()),
        facts=before.facts | pass_.provides,
    )
    infer(after)
    divergence: float | None = None
    for instrument in instruments:
        measured = instrument.after(pass_, before, after, result.report)
        divergence = divergence if measured is None else measured
    record = _record(pass_, before, after, result.report, divergence)
    return after.replace(history=(*before.history, record))


def _record(
    pass_: Pass, before: Program, after: Program, report: PassReport, divergence: float | None
) -> PassRecord:
    return PassRecord(
        name=pass_.name,
        options=option_values(pass_),
        nodes_before=before.num_nodes,
        nodes_after=after.num_nodes,
        matches=report.matches,
        divergence=divergence,
        decisions=report.decisions,
        misses=report.misses,
        errors=report.errors,
    )


def _check_expectation(pass_: Pass, report: PassReport) -> None:
    if report.matches >= pass_.expect:
        return
    nearest = f"; nearest miss: {report.misses[0]}" if report.misses else ""
    raise RecipeError(
        "recipe.no_match",
        f"Pass {pass_.name!r} matched {report.matches} times where the recipe expects {pass_.expect}.",
        f"The model has no more regions of the form that it rewrites{nearest}.",
        f"Set {pass_.name}.expect=0, or leave the pass out of the recipe for this model.",
    )


def check_order(passes: Sequence[Pass], facts: Iterable[str] = (TRACED,)) -> None:
    """Check that `passes` can run in this order on a program with `facts`.

    Raises RecipeError naming the first pass that stands before its stage, or whose required fact
    nobody has provided.
    """
    known = set(facts)
    stage = Stage.canonicalise
    for pass_ in passes:
        if pass_.stage < stage:
            raise RecipeError(
                "recipe.stage_order",
                f"Pass {pass_.name!r} of stage {pass_.stage.name!r} stands after a {stage.name!r} pass.",
                f"Stages run in the order {', '.join(entry.name for entry in Stage)}.",
                f"Move {pass_.name!r} up in the recipe.",
            )
        stage = pass_.stage
        missing = sorted(pass_.requires - known)
        if missing:
            raise _missing_fact(pass_, missing[0], passes)
        known |= pass_.provides


def _missing_fact(pass_: Pass, fact: str, passes: Sequence[Pass]) -> RecipeError:
    later = [other.name for other in passes if fact in other.provides]
    fix = (
        f"Move {later[0]!r} before {pass_.name!r}."
        if later
        else f"Add a pass that provides {fact!r} before {pass_.name!r}; `llmc passes` says which do."
    )
    return RecipeError(
        "recipe.missing_fact",
        f"Pass {pass_.name!r} needs a program that is {fact!r}.",
        "No pass before it in the recipe provides that.",
        fix,
    )


def until_stage(passes: Sequence[Pass], stage: Stage) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """`passes` split in those of stages before `stage`, and the rest."""
    return (
        tuple(pass_ for pass_ in passes if pass_.stage < stage),
        tuple(pass_ for pass_ in passes if pass_.stage >= stage),
    )
