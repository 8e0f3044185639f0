"""How far a target's code is from the program it was generated from, node by node: the first node at which it
leaves the program names the code that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem

from torch import Tensor, fx

from ..ir.program import Program
from ..ir.vocabulary import operator_name
from .node_values import NodeRun, layer_of, relative_error

# Code that rounds in other places than the program does is off by this much of a node at most, or by so many
# times as much as what the node is computed from.
ROUNDING = 0.02
_GROWTH = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLine:
    """One node: the part of the code that makes it, the nodes that have no value of their own because that
    part computes them `inside`, the relative error to the program, and what was allowed. `foreign` says in
    what the artifact's own code of that part is not the code that was run; empty where it is."""

    node: str
    operator: str
    layer: str
    call: str
    inside: tuple[str, ...]
    error: float
    allowed: float
    foreign: str = ""

    @property
    def exceeds(self) -> bool:
        """Whether the node's own code is to blame."""
        return bool(self.foreign) or not self.error <= self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTrace:
    """The nodes in order, of `code` (the subject of a sentence), whose parts are called `part` and lie in
    `file`. `same_as_shipped` says whether what the artifact runs gives the traced code's logits to the bit;
    `difference` what it means that it does not, empty where that is rounding."""

    code: str
    part: str
    file: str
    lines: tuple[CodeLine, ...]
    same_as_shipped: bool
    difference: str

    @property
    def first(self) -> CodeLine | None:
        """The first node whose code is to blame."""
        return next((line for line in self.lines if line.exceeds), None)

    def error_at(self, node: str) -> float | None:
        """The error at one node; None where it was not traced."""
        return next((line.error for line in self.lines if line.node == node), None)

    def sentence(self) -> str:
        """The same in words."""
        shipped = f" {self.difference}" if self.difference else ""
        if self.first is None:
            worst = max((line.error for line in self.lines), default=0.0)
            return f"{self.code} follows the program at every node, to {worst:.2g}.{shipped}"
        line = self.first
        where = f" in {line.layer}" if line.layer else ""
        if line.foreign:
            return (
                f"{self.code} follows the program up to node {line.node} ({line.operator}){where}, but the "
                f"artifact does not hold that code there: {line.foreign}. What wrote the artifact is to "
                f"blame, or it was changed since: compile the model again.{shipped}"
            )
        inside = f", which also computes {', '.join(line.inside)}" if line.inside else ""
        return (
            f"{self.code} first leaves the program at node {line.node} ({line.operator}){where}: "
            f"{line.error:.2g} of its size, where {line.allowed:.2g} is allowed. The code is to blame: see "
            f"the {self.part} `{line.call}` in {self.file}{inside}.{shipped}"
        )


def code_lines(
    program: Program, expected: NodeRun, found: Mapping[str, Tensor], calls: Mapping[str, str]
) -> tuple[CodeLine, ...]:
    """A line for each node of `program` whose value the code told, in `found`; `calls[node]` made it."""
    lines: list[CodeLine] = []
    errors: dict[fx.Node, float] = {}
    told = {name for name in found if name in expected.rows}
    for node in program.graph.nodes:
        above = max((errors.get(other, 0.0) for other in node.all_input_nodes), default=0.0)
        errors[node] = above
        if node.name not in told:
            continue
        error = relative_error(expected.rows[node.name], found[node.name])
        lines.append(
            CodeLine(
                node=node.name,
                operator=operator_name(node.target),
                layer=layer_of(node),
                call=calls[node.name],
                inside=_inside(node, told, expected),
                error=error,
                allowed=max(ROUNDING, _GROWTH * above),
            )
        )
        errors[node] = error
    return tuple(lines)


def _inside(node: fx.Node, told: set[str], expected: NodeRun) -> tuple[str, ...]:
    """The nodes with rows between `node` and those above it whose values were told. What gives several values
    was told where another of its parts was."""
    found: dict[str, None] = {}
    left = list(node.all_input_nodes)
    while left:
        current = left.pop()
        if current.op != "call_function" or current.name in told or current.name in found:
            continue
        parts = {user for user in current.users if user.target is getitem} - {node}
        if current.name in expected.rows:
            found[current.name] = None
        elif any(part.name in told for part in parts):
            continue
        left.extend(current.all_input_nodes)
    return tuple(reversed(found))
