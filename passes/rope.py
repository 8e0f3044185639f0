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
from typing import ClassVar

from torch import fx

from ..ir.program import Program
from ..ir.weights import Constant, Expr
from ..spec.history import Decision
from .base import Contract, Lossy, PassContext, PassReport, PassResult, Stage, Within, expect_option
from .graph import calls, erase_dead, fresh_name, read_weight
from .rewrite import (
    Dim,
    aten,
    dtype_of,
    insert,
    llmc,
    replace,
    reshape_sizes,
    same_shape,
    shape_of,
)
from .rope_probe import RopeForm
from .rope_search import FoundRope, RopeSearch, static_sizes, token_axis
from .simplify import SIMPLE
from .simplify_rules import permuted


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
        search = RopeSearch(program, graph, context.seed)
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


class _Editor:
    """Puts ropes into a graph."""

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.added: dict[str, Expr] = {}
        self._program = program
        self._graph = graph
        self._vectors: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._positions = next(node for node in graph.nodes if node.target == "positions")

    def put(self, found: FoundRope) -> None:
        """Compute `found.bottom` by one rope from `found.top`."""
        rank, axis = len(shape_of(found.top)), token_axis(found.top)
        ahead = [axis, *(dim for dim in range(rank) if dim != axis)]
        back = sorted(range(rank), key=ahead.__getitem__)
        inv_freq = self._vector(found.inv_freq, found.form.backward)
        with self._graph.inserting_after(found.bottom):
            marker = self._graph.call_function(llmc.rope.default, (found.top,))
        with self._graph.inserting_before(marker):
            x = permuted(found.top, ahead)
            width = shape_of(found.bottom)[-1]
            assert isinstance(width, int)
            heads = self._reshaped(x, (shape_of(x)[0], prod(static_sizes(x)) // width, width))
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


def _decisions(found: list[FoundRope]) -> list[Decision]:
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
