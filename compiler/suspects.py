"""Which node of a rewritten program first differs from the program before, and by how much.

Nodes that keep their name through a pass are compared one to one; a difference that enters between two such
nodes is laid on the first new node between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.quantized import dequantize_rows, quantize_rtn
from ..ir.vocabulary import operator_name
from ..passes.fuse_linears import LINEAR
from ..passes.graph import argument, calls
from ..passes.quantize.replace import QUANTIZED_LINEAR
from ..spec.quant import parse_scheme
from .node_values import NodeRun, layer_of, relative_error, run_nodes

# A product over codes may be this many times as far from the plain one as rounding to nearest in the same
# scheme is: what any method that looks at data stays below.
_ROUNDING_FACTOR = 1.5
# What rounding inputs, or a cache in few bits, may add to each node.
_ROUNDING_FLOOR = 0.02
# Without a product to compare with, more than this is no rounding.
_LOSSY_LIMIT = 0.5
_VIEWS = frozenset({"reshape", "slice", "permute", "view", "select", "expand", "unsqueeze", "getitem"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A node where programs part: its name, operator and layer; `error` is relative, `allowed` its bound.

    `region` lists every new node between the last value that was right and the first that is not, `node`
    among them.
    """

    node: str
    operator: str
    layer: str
    error: float
    allowed: float
    region: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The same in words."""
        where = f" in {self.layer}" if self.layer else ""
        others = ", ".join(name for name in self.region if name != self.node)
        beside = f" (or one of {others})" if others else ""
        sizes = f"off by {self.error:.2g}, {self.allowed:.2g} is allowed"
        return f"node {self.node} ({self.operator}){where}{beside}: {sizes}"


def first_difference(
    before: Program, after: Program, sequences: Sequence[Sequence[int]], allowed: float
) -> Suspect | None:
    """The first node of `after` that is further from `before` than `allowed` (relative), or None."""
    return _first_apart(before, after, run_nodes(before, sequences), run_nodes(after, sequences), allowed)


def _first_apart(
    before: Program, after: Program, expected: NodeRun, found: NodeRun, allowed: float
) -> Suspect | None:
    right: set[fx.Node] = set()
    for node in after.graph.nodes:
        error = _error(expected, found, node)
        if error is None:
            continue
        above = _unknown_above(node, right)
        if error <= allowed:
            right.update(above)
            continue
        new = [other for other in above if other.name not in expected.rows and _computes(other)]
        culprit = new[-1] if new and not _is_changed(node, before.graph) else node
        return Suspect(
            node=culprit.name,
            operator=operator_name(culprit.target),
            layer=layer_of(culprit) or layer_of(node),
            error=error,
            allowed=allowed,
            region=tuple(other.name for other in new),
        )
    return None


def _unknown_above(node: fx.Node, right: set[fx.Node]) -> list[fx.Node]:
    """`node` and what it is computed from that is not known to be right, in order of the graph."""
    left, found = [node], set[fx.Node]()
    while left:
        current = left.pop()
        if current not in found and current not in right and current.op == "call_function":
            found.add(current)
            left.extend(current.all_input_nodes)
    return [other for other in node.graph.nodes if other in found]


def _is_changed(node: fx.Node, before: fx.Graph) -> bool:
    """Whether a node that was there before has other settings now."""
    was = next((other for other in before.nodes if other.name == node.name), None)
    return was is not None and (_settings(was) != _settings(node) or was.target is not node.target)


def _settings(node: fx.Node) -> list[object]:
    return [value for value in (*node.args, *node.kwargs.values()) if not isinstance(value, fx.Node)]


def _computes(node: fx.Node) -> bool:
    """Whether a node makes values, and does not only show others in another shape."""
    return operator_name(node.target).split(".")[1] not in _VIEWS


def _error(expected: NodeRun, found: NodeRun, node: fx.Node) -> float | None:
    """The error of a node that both runs have; None where it cannot be compared."""
    if node.name not in expected.rows or node.name not in found.rows:
        return None
    one, other = expected.rows[node.name], found.rows[node.name]
    return relative_error(one, other) if one.numel() == other.numel() else None


def first_lossy_difference(
    before: Program, after: Program, sequences: Sequence[Sequence[int]]
) -> Suspect | None:
    """The first node of `after`, the result of a pass that trades accuracy, that loses more than rounding
    does; None where none does.

    Each product over codes is computed again on its own inputs with the weight before the pass, and with that
    weight rounded to nearest in the same scheme. A weight that makes up for what was rounded before it is
    further from the first, and has to be nearer than the second to what the product was before the pass.
    """
    expected, found = run_nodes(before, sequences), run_nodes(after, sequences)
    suspect = _ProductCheck(before, after).first(expected, found)
    if suspect is not None:
        return suspect
    error = relative_error(expected.logits, found.logits)
    if error <= _LOSSY_LIMIT:
        return None
    return _first_apart(before, after, expected, found, _LOSSY_LIMIT) or Suspect(
        node="output", operator="logits", layer="", error=error, allowed=_LOSSY_LIMIT
    )


class _ProductCheck:
    """Products over codes that a pass made, against what they replaced."""

    def __init__(self, before: Program, after: Program) -> None:
        self._before = before
        self._after = after
        old = set(before.used_weights())
        self._new = [
            node
            for node in after.graph.nodes
            if node.op == "call_function"
            and node.target is QUANTIZED_LINEAR
            and str(argument(node, "codes").target) not in old
        ]

    def first(self, expected: NodeRun, found: NodeRun) -> Suspect | None:
        for node in self._new:
            source = argument(node, "x")
            weight = str(argument(node, "codes").target).removesuffix(".codes")
            if source.name not in found.rows or weight not in self._before.weights:
                continue
            before = self._before.weights.evaluate(weight)
            suspect = self._judge(node, found.rows[source.name], before, self._was(expected, weight))
            if suspect is not None:
                return suspect
        return None

    def _was(self, expected: NodeRun, weight: str) -> Tensor | None:
        """What the product over `weight` was before the pass, its bias apart; None where there was none."""
        for node in calls(self._before.graph, LINEAR):
            if argument(node, "weight").target == weight and node.name in expected.rows:
                bias = argument(node, "bias")
                added = 0.0 if bias is None else self._before.weights.evaluate(str(bias.target)).float()
                return expected.rows[node.name] - added
        return None

    def _judge(self, node: fx.Node, x: Tensor, weight: Tensor, was: Tensor | None) -> Suspect | None:
        values = self._after.weights.evaluate
        scheme = parse_scheme(str(argument(node, "scheme")))
        zeros = argument(node, "zeros")
        parts = [values(str(argument(node, part).target)) for part in ("codes", "scales")]
        zero_points = None if zeros is None else values(str(zeros.target))
        width = weight.shape[-1]
        rows = x.reshape(-1, width)
        plain = rows @ weight.float().T
        nearest = quantize_rtn(weight, scheme)
        rounded = dequantize_rows(*nearest, scheme, width)
        stored = dequantize_rows(parts[0], parts[1], zero_points, scheme, width)
        by_codes, by_nearest = rows @ stored.T, rows @ rounded.T
        allowed = _ROUNDING_FACTOR * relative_error(plain, by_nearest) + _ROUNDING_FLOOR
        error = relative_error(plain, by_codes)
        if error <= allowed:
            return None
        if was is not None and was.numel() == plain.numel():
            was = was.reshape(plain.shape)
            if relative_error(was, by_codes) <= relative_error(was, by_nearest):
                return None
        return Suspect(
            node=node.name,
            operator=operator_name(node.target),
            layer=layer_of(node),
            error=error,
            allowed=allowed,
        )


def logits_error(expected: Tensor, found: Tensor) -> float:
    """`max|a - b| / max|a|` over all logits, infinite where they stop being finite."""
    if not bool(torch.isfinite(found).all()):
        return 0.0 if bool((found.isfinite() == expected.isfinite()).all()) else float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
