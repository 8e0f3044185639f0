"""What passes that find codes by computation share: from options and context to a program and a report."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.program import Program
from ...ir.weights import Expr
from ...spec.quant import QuantScheme
from ..base import PassContext, PassReport, PassResult
from .needs import SEARCH_NEEDS, require_calibration
from .replace import parts_of
from .rounding import Method
from .selection import Choice, WeightOptions, decisions_on, misses_of, replace_weights
from .solve import solve_with_data, solve_without_data
from .tuned import tuned_parts


def run_solver(
    options: WeightOptions, program: Program, context: PassContext, method: Method, *, data: bool
) -> PassResult:
    """`program` with the weights chosen by `options` found by `method`, with calibration tokens or without.

    When only planning, weights are left to be rounded to nearest. Raises RecipeError when tokens are
    needed and there are none.
    """
    choices = options.choices(program.copy_graph(), program)
    return run_choices(options.name, choices, program, context, method, data=data)


def run_choices(
    name: str,
    choices: Mapping[str, Choice],
    program: Program,
    context: PassContext,
    method: Method,
    *,
    data: bool,
) -> PassResult:
    """As `run_solver`, for pass `name`, with a choice made for each weight already."""
    graph = program.copy_graph()
    matches = sum(choice.scheme is not None for choice in choices.values())
    misses = misses_of(program, choices)
    if context.planning:
        done = replace_weights(program, graph, choices, parts_of)
        planned = PassReport(matches=matches, decisions=decisions_on(choices), misses=misses)
        return PassResult(program=done, report=planned)
    calibration = require_calibration(name, context, *SEARCH_NEEDS, data=data)
    solve = solve_with_data if data else solve_without_data
    solutions = solve(program, choices, method, calibration)

    def parts(weight: str, expr: Expr, scheme: QuantScheme) -> dict[str, Expr]:
        return solutions.parts[weight]

    done = replace_weights(program, graph, choices, parts)
    decisions = decisions_on(choices, solutions.notes)
    if method.tuning is not None:
        tuned = tuned_parts(program, choices, solutions, method, calibration, context.seed)
        done = done.replace(weights=done.weights.with_entries(tuned.parts))
        decisions = (*decisions, tuned.decision)
    report = PassReport(
        matches=matches,
        decisions=decisions,
        misses=misses,
        errors=solutions.errors,
    )
    return PassResult(program=done, report=report)
