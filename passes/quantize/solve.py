"""Find the codes of all chosen weights, segment by segment, each on what the quantised ones before it give.

Knows in which order weights are found and where results are kept; the methods are those of `rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.quantized import QTensor, dequantize_rows
from ...ir.weights import Expr
from ...spec.history import LayerError
from ..calibration import Calibration
from ..fuse_linears import LINEAR
from ..graph import argument, is_call
from .experts import solve_experts
from .finite import finite_weight
from .linears import Streams, solve_linears
from .replace import MOE, Role
from .rounding import Method, round_matrix
from .segments import Segment, product_sites
from .selection import Choice, scheme_of
from .solved import Result, SolvedFolder, fingerprint
from .walk import Walk

_TABLE_ROLES = (Role.embedding, Role.tied)


class Solutions(NamedTuple):
    """Stored parts by weight, what each weight loses, and what is to be said about it."""

    parts: dict[str, dict[str, Expr]]
    errors: tuple[LayerError, ...]
    notes: dict[str, str]


def solve_without_data(
    program: Program, choices: Mapping[str, Choice], method: Method, calibration: Calibration
) -> Solutions:
    """Codes of all chosen weights by the weights alone, one at a time."""
    solver = _Solver(program, choices, method, calibration)
    for index, name in enumerate(solver.chosen):
        solver.finish(index, lambda name=name: {name: solver.by_weight(name)})
    return solver.solutions()


def solve_with_data(
    program: Program, choices: Mapping[str, Choice], method: Method, calibration: Calibration
) -> Solutions:
    """Codes of all chosen weights by what calibration tokens bring to them.

    Tables are read before any product, so they are rounded by the weights alone, tied heads included.
    """
    solver = _Solver(program, choices, method, calibration)
    sites = [site for site in product_sites(program.graph) if solver.is_site(site)]
    now = Walk(program, sites, calibration)
    before = Walk(program, sites, calibration) if method.catch_up else None
    try:
        for segment in now.segments:
            results = solver.finish(
                segment.index, lambda segment=segment: solver.by_data(Streams(now, before), segment)
            )
            if segment is now.segments[-1]:
                break
            now.advance(segment, solver.values(results))
            if before is not None:
                before.advance(segment, {})
    finally:
        now.close()
        if before is not None:
            before.close()
    return solver.solutions()


class _Solver:
    """The weights to be found, and those found so far."""

    def __init__(
        self, program: Program, choices: Mapping[str, Choice], method: Method, calibration: Calibration
    ) -> None:
        self._program = program
        self._choices = choices
        self._method = method
        self._calibration = calibration
        self.chosen = [name for name, choice in choices.items() if choice.scheme is not None]
        key = fingerprint(program, replace(method, tuning=None), dict(choices), calibration.cache_key())
        self._folder = SolvedFolder(calibration.folder / key)
        self._parts: dict[str, dict[str, Expr]] = {}
        self._errors: dict[str, LayerError] = {}
        self._notes: dict[str, str] = {}
        self._done = 0

    def is_site(self, node: fx.Node) -> bool:
        """Whether a product's weights are to be found from data."""
        return any(self._is_own(name) for name in weight_names(node))

    def _is_own(self, name: str) -> bool:
        choice = self._choices.get(name)
        return choice is not None and choice.scheme is not None and choice.role not in _TABLE_ROLES

    def finish(self, index: int, compute: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """The results of segment `index`: those of an earlier run, or of `compute`, kept for later ones."""
        results = self._folder.load(index)
        if results is None:
            results = compute()
            if results:
                self._folder.save(index, results)
        for name in results:
            expr = self._program.weights[name]
            self._parts[name] = self._folder.parts(index, name, expr, results)
            self._done += math.prod(expr.shape)
            self._errors[name] = results[name].error
            if results[name].note:
                self._notes[name] = results[name].note
        total = sum(math.prod(self._program.weights[name].shape) for name in self.chosen)
        self._calibration.watch(self._done, total, next(iter(results), ""))
        return results

    def by_weight(self, name: str) -> Result:
        """One weight by itself, a matrix or a stack of them."""
        weight = finite_weight(self._program, name)
        rounded = round_matrix(weight.flatten(0, -2), scheme_of(self._choices[name]), self._method)
        codes, scales, zeros = (
            None if part is None else part.unflatten(0, weight.shape[:-1]) for part in rounded.tensor
        )
        assert codes is not None
        assert scales is not None
        error = LayerError(subject=name, error=rounded.error, nearest_error=rounded.nearest_error)
        return Result(QTensor(codes, scales, zeros), error, "")

    def by_data(self, streams: Streams, segment: Segment) -> dict[str, Result]:
        """All weights of one segment; of the first, which has no products, the tables."""
        if segment.x is None:
            tables = [name for name in self.chosen if self._choices[name].role in _TABLE_ROLES]
            return {name: self.by_weight(name) for name in tables}
        found: dict[str, Result] = {}
        linears = [site for site in segment.sites if is_call(site, LINEAR)]
        if is_call(segment.sites[0], MOE):
            found |= solve_experts(self._program, streams, segment.sites[0], self._choices, self._method)
        if linears:
            found |= solve_linears(self._program, streams, linears, self._choices, self._method)
        return found

    def values(self, results: Mapping[str, Result]) -> dict[str, Tensor]:
        """What the codes of results stand for."""
        return {
            name: coded_values(self._program.weights[name], self._choices[name], result.tensor)
            for name, result in results.items()
        }

    def solutions(self) -> Solutions:
        """Everything found."""
        return Solutions(self._parts, tuple(self._errors.values()), self._notes)


def coded_values(expr: Expr, choice: Choice, tensor: QTensor) -> Tensor:
    """What the codes of a weight stand for, in float32; a table in its own dtype."""
    dtype = expr.dtype if choice.role in _TABLE_ROLES else torch.float32
    codes, scales, zeros = tensor
    rows = (codes.flatten(0, -2), scales.flatten(0, -2), None if zeros is None else zeros.flatten(0, -2))
    return dequantize_rows(*rows, scheme_of(choice), expr.shape[-1], dtype).reshape(expr.shape)


def weight_names(site: fx.Node) -> list[str]:
    """The weights of a linear or a mixture of experts, where the graph reads them directly."""
    parts = ("gate_up", "down") if is_call(site, MOE) else ("weight",)
    nodes = [argument(site, part) for part in parts]
    return [str(node.target) for node in nodes if node.op == "get_attr"]
