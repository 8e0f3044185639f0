"""What passes that find codes by computation share: from options and context to a program and a report."""

from __future__ import annotations

from ...ir.program import Program
from ...ir.weights import Expr
from ...spec.errors import RecipeError
from ...spec.quant import QuantScheme
from ..base import PassContext, PassReport, PassResult
from .replace import parts_of
from .rounding import Method
from .selection import WeightOptions, decisions_on, misses_of, replace_weights
from .solve import solve_with_data, solve_without_data


def run_solver(
    options: WeightOptions, program: Program, context: PassContext, method: Method, *, data: bool
) -> PassResult:
    """`program` with the weights chosen by `options` found by `method`, with calibration tokens or without.

    When only planning, weights are left to be rounded to nearest. Raises RecipeError when tokens are
    needed and there are none.
    """
    graph = program.copy_graph()
    choices = options.choices(graph, program)
    matches = sum(choice.scheme is not None for choice in choices.values())
    misses = misses_of(program, choices)
    if context.planning:
        done = replace_weights(program, graph, choices, parts_of)
        planned = PassReport(matches=matches, decisions=decisions_on(choices), misses=misses)
        return PassResult(program=done, report=planned)
    calibration = context.calibration
    if calibration is None or (data and not calibration.sequences):
        raise RecipeError(
            "recipe.no_calibration",
            f"Pass {options.name!r} has no calibration data.",
            "It finds codes by what tokens bring to each layer, and the compile was given none.",
            "Give the pass context a Calibration, or use scale_search with data=false.",
        )
    solve = solve_with_data if data else solve_without_data
    solutions = solve(program, choices, method, calibration)

    def parts(name: str, expr: Expr, scheme: QuantScheme) -> dict[str, Expr]:
        return solutions.parts[name]

    done = replace_weights(program, graph, choices, parts)
    report = PassReport(
        matches=matches,
        decisions=decisions_on(choices, solutions.notes),
        misses=misses,
        errors=solutions.errors,
    )
    return PassResult(program=done, report=report)
