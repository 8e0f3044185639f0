"""Where rotary embeddings lie between projections and attention, told by what regions compute.

Knows which operators may take part in one; changes no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Program
from .regions import Regions, raised, same_structure
from .rewrite import (
    counted,
    dtype_of,
    is_tensor,
    operator_of,
    same_shape,
    shape_of,
)
from .rope_probe import RopeForm, probe_positions, recognise_rope


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Where rotated data comes from: nothing above these belongs to a rope.
_SOURCES = _names(
    "linear addmm mm embedding llmc.linear llmc.embedding llmc.attention llmc.moe llmc.quantized_linear"
)
# Linear in the data, whatever the tables are: agreement on random data is then no accident.
_LINEAR = _names(
    """
    _to_copy add alias cat chunk clone complex contiguous div expand flatten flip getitem imag mul narrow
    neg permute real reshape roll rsub select slice split split_with_sizes squeeze stack sub t to transpose
    type_as unbind unflatten unsqueeze view view_as_complex view_as_real
    """
)
# What tables of cosines may be made of: smooth in the position, so that samples speak for all of them.
_SMOOTH = _LINEAR | _names(
    """
    arange bmm cos exp matmul mm ones_like polar pow reciprocal repeat repeat_interleave sin sym_size
    zeros_like
    """
)
_REACH = 10
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class FoundRope:
    """`bottom` is `form` of `top`, with the inverse frequencies that `inv_freq` reads."""

    top: fx.Node
    bottom: fx.Node
    form: RopeForm
    inv_freq: fx.Node
    subject: str


class RopeSearch:
    """Looks for ropes between projections and attention; changes nothing."""

    def __init__(self, program: Program, graph: fx.Graph, seed: int) -> None:
        self.found: list[FoundRope] = []
        self.misses: list[str] = []
        self._regions = Regions(graph, program.weights, _SOURCES)
        self._random = torch.Generator().manual_seed(seed)
        self._positions = probe_positions(program.spec.max_context, self._random)
        inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
        self._known: dict[fx.Node, Any] = {
            inputs["positions"]: self._positions,
            inputs["input_ids"]: torch.zeros_like(self._positions),
        }
        self._tokens = shape_of(inputs["positions"])
        self._answers: dict[Any, tuple[RopeForm, fx.Node] | str] = {}
        self._seen: set[fx.Node] = set()

    def visit(self, root: Any, subject: str, depth: int = 0) -> None:
        """Look above `root`, and above each operand where its data comes from several places."""
        if not isinstance(root, fx.Node) or root in self._seen:
            return
        self._seen.add(root)
        cuts = self._regions.cuts(root)
        reasons: list[str] = []
        low = 0
        while low + 1 < len(cuts):
            if not self._tables_enter(cuts[low], cuts[low + 1]):
                low += 1
                continue
            answer = self._widest(cuts, low)
            if isinstance(answer, str):
                reasons.append(f"{subject}: {answer}")
                low += 1
                continue
            bottom, top, form, inv_freq = answer
            self.found.append(FoundRope(cuts[top], cuts[bottom], form, inv_freq, subject))
            low = max(top, low + 1)
        self.misses.extend(reasons)
        if not self._regions.is_terminal(cuts[-1]) and depth < _DEPTH:
            for source in self._regions.data_inputs(cuts[-1]):
                self.visit(source, subject, depth + 1)

    def _tables_enter(self, bottom: fx.Node, top: fx.Node) -> bool:
        tables = self._regions.tables_above(self._regions.between(bottom, top))
        return any(node.op == "placeholder" for node in tables)

    def _widest(self, cuts: list[fx.Node], low: int) -> tuple[int, int, RopeForm, fx.Node] | str:
        """The widest region around cuts `low` and `low + 1` that is a rope: indexes of its ends, its form."""
        first = low
        while first > 0 and low - first < _REACH and self._is_linear(cuts[first - 1], cuts[first]):
            first -= 1
        last = low + 1
        while last + 1 < len(cuts) and last - low < _REACH and self._is_linear(cuts[last], cuts[last + 1]):
            last += 1
        reason = f"{cuts[low].name} has another shape than what it is computed from"
        for bottom in range(first, low + 1):
            for top in range(last, low, -1):
                if not self._comparable(cuts[bottom], cuts[top]):
                    continue
                answer = self._ask(cuts[bottom], cuts[top])
                if not isinstance(answer, str):
                    return bottom, top, *answer
                reason = f"{cuts[bottom].name} from {cuts[top].name}: {answer}"
        return reason

    def _is_linear(self, bottom: fx.Node, top: fx.Node) -> bool:
        return all(operator_of(node) in _LINEAR for node in self._regions.between(bottom, top))

    def _comparable(self, bottom: fx.Node, top: fx.Node) -> bool:
        """Whether both are floats with as many elements for each token, in the same order of dimensions."""
        if not (is_tensor(bottom) and is_tensor(top)):
            return False
        if not (dtype_of(bottom).is_floating_point and dtype_of(top).is_floating_point):
            return False
        if not (self._has_tokens(bottom) and self._has_tokens(top)):
            return False
        before, after = counted(shape_of(top)), counted(shape_of(bottom))
        if same_shape(before, after):
            return same_shape(shape_of(top)[-1:], shape_of(bottom)[-1:])
        flat = token_axis(bottom) == token_axis(top) == 0
        return flat and prod(static_sizes(bottom)) == prod(static_sizes(top))

    def _has_tokens(self, node: fx.Node) -> bool:
        """Whether one dimension of `node`, not the last, counts tokens, and no other is symbolic."""
        symbolic = [index for index, dim in enumerate(shape_of(node)) if not isinstance(dim, int)]
        if len(symbolic) != 1 or symbolic[0] == len(shape_of(node)) - 1:
            return False
        return self._counts_tokens(shape_of(node)[symbolic[0]])

    def _counts_tokens(self, dim: Any) -> bool:
        return same_shape((dim,), self._tokens)

    def _ask(self, bottom: fx.Node, top: fx.Node) -> tuple[RopeForm, fx.Node] | str:
        nodes = self._regions.between(bottom, top)
        key = same_structure(nodes, top)
        if key not in self._answers:
            self._answers[key] = self._probe(nodes, top)
        return self._answers[key]

    def _probe(self, nodes: list[fx.Node], top: fx.Node) -> tuple[RopeForm, fx.Node] | str:
        tables = self._regions.tables_above(nodes)
        foreign = next((node for node in nodes if operator_of(node) not in _LINEAR), None)
        if foreign is None:
            made = (node for node in tables if node.op == "call_function")
            foreign = next((node for node in made if operator_of(node) not in _SMOOTH), None)
        if foreign is not None:
            return f"{foreign.name} ({operator_of(foreign)}) is in the way"
        readers = [node for node in tables if self._frequencies(node) is not None]
        count = len(self._positions)
        sizes = [dim if isinstance(dim, int) else count for dim in shape_of(top)]
        x = torch.randn(sizes, generator=self._random)
        try:
            y = self._regions.evaluate([*tables, *nodes], {**self._known, top: x})
        except (LookupError, RuntimeError) as error:
            return f"it cannot be evaluated ({str(error).splitlines()[0]})"
        form = recognise_rope(
            _as_heads(x, token_axis(top), y.shape[-1]),
            _as_heads(raised(y), token_axis(nodes[-1]), y.shape[-1]),
            self._positions,
            [self._frequencies(node) for node in readers],  # pyright: ignore[reportArgumentType]
            _numbers(nodes + tables),
        )
        return form if isinstance(form, str) else (form, readers[form.candidate])

    def _frequencies(self, node: fx.Node) -> Tensor | None:
        """The inverse frequencies that `node` may read: a constant with one dimension that counts."""
        value = self._regions.constant(node)
        if value is None or not value.is_floating_point() or sum(size > 1 for size in value.shape) > 1:
            return None
        return value.float().flatten() if value.dim() else None


def token_axis(node: fx.Node) -> int:
    """The one dimension of `node` that counts tokens."""
    return next(index for index, dim in enumerate(shape_of(node)) if not isinstance(dim, int))


def static_sizes(x: fx.Node) -> list[int]:
    """The sizes of all dimensions but the first."""
    return [int(dim) for dim in shape_of(x)[1:]]


def _as_heads(x: Tensor, axis: int, width: int) -> Tensor:
    """`x` as `[T, H, D]` with its dimension `axis` as T and D as given."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1, width)


def _numbers(nodes: list[fx.Node]) -> list[float]:
    """The numbers that calls multiply or divide by."""
    direct = {
        float(arg) if operator_of(node) == "mul" else 1 / float(arg)
        for node in nodes
        if operator_of(node) in ("mul", "div")
        for arg in node.args[1:2]
        if isinstance(arg, int | float) and arg
    }
    return sorted(direct)
