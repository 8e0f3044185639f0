"""Give activations that are spelled out their name.

    0.5 * x * (1 + tanh(0.79788 * (x + 0.044715 * pow(x, 3))))    →    aten.gelu(x, approximate="tanh")
    x * sigmoid(x)                                                →    aten.silu(x)

A spelling is told by its values: a region of elementwise operators from one tensor is evaluated over a
dense range of numbers and compared with each activation that ATen has under a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..ir.program import Program
from .base import Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .graph import erase_dead
from .regions import Regions, same_structure
from .rewrite import ELEMENTWISE, aten, dtype_of, insert, is_tensor, operator_of, same_shape, shape_of
from .simplify import SIMPLE

_CURVED = frozenset({"tanh", "sigmoid", "erf", "exp"})
_LONGEST = 12
_TOLERANCE = 2e-6


@dataclass(frozen=True, slots=True)
class _Named:
    operator: Any
    kwargs: dict[str, Any]
    function: Callable[[Tensor], Tensor]


_NAMED = (
    _Named(aten.silu.default, {}, F.silu),
    _Named(aten.gelu.default, {}, F.gelu),
    _Named(aten.gelu.default, {"approximate": "tanh"}, partial(F.gelu, approximate="tanh")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameActivations:
    """Activations written out, as the operator of their name."""

    name: ClassVar[str] = "name_activations"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-5)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace each spelling by its name."""
        graph = program.copy_graph()
        regions = Regions(graph, program.weights, _others(graph))
        answers: dict[Any, _Named | None] = {}
        matches = 0
        for node in reversed(list(graph.nodes)):
            if operator_of(node) != "mul" or not node.users or regions.is_table(node):
                continue
            found = _widest(regions, node, answers)
            if found is None:
                continue
            named, source = found
            with graph.inserting_after(node):
                better = insert(graph, named.operator, (source,), like=node.meta["val"], **named.kwargs)
            node.replace_all_uses_with(better)
            matches += 1
        erase_dead(graph)
        report = PassReport(matches=matches)
        return PassResult(program=program.replace(graph=graph), report=report)


def _others(graph: fx.Graph) -> frozenset[str]:
    """Every operator of the graph that is not elementwise."""
    return frozenset(operator_of(node) for node in graph.nodes) - ELEMENTWISE


def _widest(
    regions: Regions, node: fx.Node, answers: dict[Any, _Named | None]
) -> tuple[_Named, fx.Node] | None:
    """The activation that `node` is of a value above it, from the nearest such value on."""
    for source in regions.cuts(node)[1:]:
        nodes = regions.between(node, source)
        if len(nodes) > _LONGEST or not all(operator_of(inner) in ELEMENTWISE for inner in nodes):
            return None
        if not any(operator_of(inner) in _CURVED for inner in nodes) or not _comparable(node, source):
            continue
        key = same_structure(nodes, source)
        if key not in answers:
            answers[key] = _recognised(regions, nodes, source)
        named = answers[key]
        if named is not None:
            return named, source
    return None


def _comparable(node: fx.Node, source: fx.Node) -> bool:
    if not is_tensor(source) or dtype_of(source) != dtype_of(node):
        return False
    return dtype_of(node).is_floating_point and same_shape(shape_of(source), shape_of(node))


def _recognised(regions: Regions, nodes: list[fx.Node], source: fx.Node) -> _Named | None:
    if any(regions.tables_above(nodes)):
        return None
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.linspace(-80, 80, 321)])
    y = regions.evaluate(nodes, {source: x})
    for named in _NAMED:
        if bool(((named.function(x) - y).abs() <= _TOLERANCE * (1 + x.abs())).all()):
            return named
    return None
