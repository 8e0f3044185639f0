"""Find rotary embeddings by what they compute, and call `llmc.rope` instead.

    c = mul(q, cos); n = neg(slice(q, 8:16)); r = cat([n, slice(q, 0:8)])
    s = mul(r, sin); y = add(c, s)            →    y = llmc.rope(q, positions, inv_freq, 1.0, "half", False)

The way from each attention's q and k up to its projection is cut wherever all data passes through one
value. Between two cuts where tables enter, the region is evaluated on random numbers at positions up to
the longest context and compared with every form of rope. Only operators that are linear in the data are
let in, so that agreement on random numbers is agreement everywhere. The cosine and sine tables then die.
A model of low precision rounds its tables; `llmc.rope` does not, which the report calls a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.weights import Constant, Expr
from ..spec.history import Decision
from .base import Contract, Lossy, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .graph import calls, erase_dead, fresh_name, read_weight
from .regions import Regions, raised, same_structure
from .rewrite import (
    Dim,
    aten,
    counted,
    dtype_of,
    insert,
    is_tensor,
    llmc,
    operator_of,
    replace,
    reshape_sizes,
    same_shape,
    shape_of,
)
from .rope_probe import RopeForm, probe_positions, recognise_rope
from .simplify import SIMPLE
from .simplify_rules import permuted


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embeddings as `llmc.rope`."""

    name: ClassVar[str] = "rope"
    stage: ClassVar[Stage] = Stage.canonicalise
    requires: ClassVar[frozenset[str]] = frozenset({SIMPLE})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-5)

    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Replace every rope that is found; misses say why tables still enter some q or k."""
        graph = program.copy_graph()
        search = _Search(program, graph, context.seed)
        for attention in calls(graph, llmc.attention.default):
            for index, side in ((0, "q"), (1, "k")):
                search.visit(attention.args[index], f"{side} of layer {attention.args[5]}")
        editor = _Editor(program, graph)
        for found in search.found:
            editor.put(found)
        erase_dead(graph)
        report = PassReport(
            matches=len(search.found),
            decisions=tuple(_decisions(search.found)),
            misses=tuple(search.misses),
            contract=None if program.spec.compute_dtype == "float32" else Lossy(),
        )
        weights = program.weights.with_entries(editor.added)
        return PassResult(program=program.replace(graph=graph, weights=weights), report=report)


@dataclass(frozen=True, slots=True)
class _Found:
    """`bottom` is `form` of `top`, with the inverse frequencies that `inv_freq` reads."""

    top: fx.Node
    bottom: fx.Node
    form: RopeForm
    inv_freq: fx.Node
    subject: str


class _Search:
    """Looks for ropes between projections and attention; changes nothing."""

    def __init__(self, program: Program, graph: fx.Graph, seed: int) -> None:
        self.found: list[_Found] = []
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
            self.found.append(_Found(cuts[top], cuts[bottom], form, inv_freq, subject))
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
        flat = _token_axis(bottom) == _token_axis(top) == 0
        return flat and prod(_static(bottom)) == prod(_static(top))

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
            _as_heads(x, _token_axis(top), y.shape[-1]),
            _as_heads(raised(y), _token_axis(nodes[-1]), y.shape[-1]),
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


def _token_axis(node: fx.Node) -> int:
    """The one dimension of `node` that counts tokens."""
    return next(index for index, dim in enumerate(shape_of(node)) if not isinstance(dim, int))


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


class _Editor:
    """Puts ropes into a graph."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.added: dict[str, Expr] = {}
        self._program = program
        self._graph = graph
        self._vectors: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._positions = next(node for node in graph.nodes if node.target == "positions")

    def put(self, found: _Found) -> None:
        """Compute `found.bottom` by one rope from `found.top`."""
        rank, axis = len(shape_of(found.top)), _token_axis(found.top)
        ahead = [axis, *(dim for dim in range(rank) if dim != axis)]
        back = sorted(range(rank), key=ahead.__getitem__)
        inv_freq = self._vector(found.inv_freq, found.form.backward)
        with self._graph.inserting_after(found.bottom):
            marker = self._graph.call_function(llmc.rope.default, (found.top,))
        with self._graph.inserting_before(marker):
            x = permuted(found.top, ahead)
            width = shape_of(found.bottom)[-1]
            assert isinstance(width, int)
            heads = self._reshaped(x, (shape_of(x)[0], prod(_static(x)) // width, width))
            form = found.form
            args = (heads, self._positions, inv_freq, form.scale, form.style, form.tail)
            rotated = insert(self._graph, llmc.rope.default, args, like=heads.meta["val"])
            y = rotated if axis == 0 else permuted(self._reshaped(rotated, shape_of(x)), back)
            y = self._reshaped(y, shape_of(found.bottom))
            if dtype_of(y) != dtype_of(found.bottom):
                value = found.bottom.meta["val"]
                cast = aten._to_copy.default
                y = insert(self._graph, cast, (y,), like=value, dtype=dtype_of(found.bottom))
        self._graph.erase_node(marker)
        replace(found.bottom, y)

    def _reshaped(self, x: fx.Node, shape: tuple[Dim, ...]) -> fx.Node:
        if same_shape(shape, shape_of(x)):
            return x
        sizes = reshape_sizes(shape)
        value = x.meta["val"].reshape(sizes)
        return insert(self._graph, aten.reshape.default, (x, sizes), like=value)

    def _vector(self, reader: fx.Node, backward: bool) -> fx.Node:
        """A reader of the same numbers as a vector, negated if `backward`."""
        if len(shape_of(reader)) == 1 and not backward:
            return reader
        if (reader, backward) not in self._vectors:
            expr = self._program.weights[str(reader.target)]
            assert isinstance(expr, Constant)
            kind = "backward" if backward else "vector"
            name = fresh_name(self._program, f"{reader.target}.{kind}")
            value = expr.value.flatten()
            self.added[name] = Constant(-value if backward else value)
            with self._graph.inserting_after(reader):
                vector = read_weight(self._graph, name)
            vector.meta["val"] = reader.meta["val"].reshape(-1)
            self._vectors[reader, backward] = vector
        return self._vectors[reader, backward]


def _static(x: fx.Node) -> list[int]:
    """The sizes of all dimensions but the first."""
    return [int(dim) for dim in shape_of(x)[1:]]


def _decisions(found: list[_Found]) -> list[Decision]:
    """One decision for each form, not for each layer."""
    forms: dict[tuple[str, RopeForm], list[str]] = {}
    for one in found:
        forms.setdefault((str(one.inv_freq.target), one.form), []).append(one.subject)
    return [
        Decision(
            subject=f"{len(subjects)} of q and k, first {subjects[0]}",
            choice=f"{_words(form)}, {name}",
            reason="equal on random data at positions up to the longest context",
        )
        for (name, form), subjects in forms.items()
    ]


def _words(form: RopeForm) -> str:
    ends = f"{' backward' if form.backward else ''}{' tail' if form.tail else ''}"
    return f"{form.style}{ends}, scale {form.scale:.7g}"
