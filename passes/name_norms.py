"""Find norms that are written out, by what they compute, and call `llmc.rms_norm` or `llmc.layer_norm`.

    m = mean(x); c = sub(x, m); v = mean(pow(c, 2))
    n = mul(c, rsqrt(add(v, 1e-5)))                     →    n = llmc.layer_norm(x, None, None, 1e-5, …)

Tracing recognises the norm modules it knows; this is for those that it does not, such as norms with a
weight for each head. The weight stays a product behind the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.ops.norm import layer_norm, rms_norm
from ..ir.program import Program
from .base import Contract, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .graph import argument, erase_dead
from .regions import Regions, same_structure
from .rewrite import dtype_of, insert, is_elementwise, is_tensor, llmc, operator_of, same_shape, shape_of
from .simplify import SIMPLE

_LONGEST = 12
_TOLERANCE = 1e-5
_INNER = frozenset({"mean", "var", "std", "reshape"})


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm without weight: whether it subtracts the mean, and its eps."""

    centred: bool
    eps: float

    def apply(self, x: Tensor) -> Tensor:
        if self.centred:
            return layer_norm(x, None, None, self.eps, 0.0, "scale_then_cast")
        return rms_norm(x, None, self.eps, 0.0, "scale_then_cast")


@dataclass(frozen=True, slots=True, kw_only=True)
class NameNorms:
    """Norms written out, as the operator of their name."""

    name: ClassVar[str] = "name_norms"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-5)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace each norm by its operator; misses name reciprocal roots that are part of none."""
        graph = program.copy_graph()
        others = frozenset(operator_of(node) for node in graph.nodes if not _may_be_inside(node))
        regions = Regions(graph, program.weights, others)
        answers: dict[Any, _Norm | None] = {}
        random = torch.Generator().manual_seed(context.seed)
        matches, misses = 0, list[str]()
        for root in [node for node in graph.nodes if operator_of(node) in ("rsqrt", "reciprocal")]:
            found = [match for node in root.users if (match := _match(regions, node, answers, random))]
            if not found and operator_of(root) == "rsqrt" and not regions.is_table(root):
                misses.append(f"{root.name}: no norm without a weight gives the values of its products")
            for bottom, source, norm in found:
                _put(graph, bottom, source, norm)
                matches += 1
        erase_dead(graph)
        report = PassReport(matches=matches, misses=tuple(misses))
        return PassResult(program=program.replace(graph=graph), report=report)


def _may_be_inside(node: fx.Node) -> bool:
    return is_elementwise(node) or operator_of(node) in _INNER


def _match(
    regions: Regions, bottom: fx.Node, answers: dict[Any, _Norm | None], random: torch.Generator
) -> tuple[fx.Node, fx.Node, _Norm] | None:
    """The norm that `bottom` is of a value above it, the furthest one: a layer norm is the root-mean-square
    norm of centred values, too."""
    if operator_of(bottom) not in ("mul", "div") or not is_tensor(bottom):
        return None
    found: tuple[fx.Node, fx.Node, _Norm] | None = None
    for source in regions.cuts(bottom)[1:]:
        nodes = regions.between(bottom, source)
        if len(nodes) > _LONGEST or regions.tables_above(nodes):
            break
        if not is_tensor(source) or not same_shape(shape_of(source), shape_of(bottom)):
            continue
        if dtype_of(source) != dtype_of(bottom) or sum(not isinstance(d, int) for d in shape_of(source)) > 1:
            continue
        key = same_structure(nodes, source)
        if key not in answers:
            answers[key] = _recognised(regions, nodes, source, random)
        norm = answers[key]
        if norm is not None:
            found = bottom, source, norm
    return found


def _recognised(
    regions: Regions, nodes: list[fx.Node], source: fx.Node, random: torch.Generator
) -> _Norm | None:
    """Compare on small and on large numbers: the small ones tell eps, the large ones the rest."""
    sizes = [dim if isinstance(dim, int) else 5 for dim in shape_of(source)]
    draws = [scale * (torch.randn(sizes, generator=random) + 0.3) for scale in (1e-3, 1.0, 30.0)]
    try:
        wanted = [regions.evaluate(nodes, {source: x}) for x in draws]
    except RuntimeError:
        return None
    for eps in _small_numbers(nodes):
        for norm in (_Norm(False, eps), _Norm(True, eps)):
            if all(_close(norm.apply(x), y) for x, y in zip(draws, wanted, strict=True)):
                return norm
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


def _small_numbers(nodes: list[fx.Node]) -> list[float]:
    added = (argument(node, "other") for node in nodes if operator_of(node) == "add")
    return sorted(
        {float(number) for number in added if isinstance(number, int | float) and 0 <= number < 0.1}
    )


def _put(graph: fx.Graph, bottom: fx.Node, source: fx.Node, norm: _Norm) -> None:
    tail = (norm.eps, 0.0, "scale_then_cast")
    with graph.inserting_after(bottom):
        if norm.centred:
            better = insert(graph, llmc.layer_norm.default, (source, None, None, *tail))
        else:
            better = insert(graph, llmc.rms_norm.default, (source, None, *tail))
    better.meta["val"] = bottom.meta["val"]
    bottom.replace_all_uses_with(better)
