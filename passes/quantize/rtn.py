"""Round weights to the nearest code of a scheme, without data.

    w = weight a.weight                        c = weight a.weight.codes
    y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                               y = llmc.quantized_linear(x, c, s, None, None, 'int4_g32')

Embeddings and experts likewise. A table tied to the head is quantised once and both read the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, NamedTuple

from torch import fx

from ...ir.program import Program
from ...ir.weights import Expr
from ...spec.errors import RecipeError
from ...spec.history import Decision
from ...spec.quant import QuantScheme
from ..base import (
    CANONICAL,
    QUANTIZED,
    Contract,
    Lossy,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    expect_option,
    option,
)
from ..bits import num_parameters
from ..graph import argument, calls, erase_dead, weight_nodes
from .replace import MOE, Role, quantize_experts, quantize_matrix, weight_roles

_BITS = (3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn:
    """Round-to-nearest quantisation of linears, experts, head and embedding."""

    name: ClassVar[str] = "rtn"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()

    bits: int = option(4, "Bits of a weight code.", choices=_BITS, search=_BITS)
    group_size: int = option(
        32,
        "Weights that share a scale, along the input; 0 is one scale a row.",
        choices=(0, 32, 64, 128),
        search=(32, 64, 128),
    )
    symmetric: bool = option(True, "Codes around zero; otherwise each group stores a zero point too.")
    head_bits: int = option(
        8,
        "Bits of the output head, and of a table tied to it; 0 keeps it.",
        choices=(0, *_BITS),
        search=(4, 8),
    )
    embedding_bits: int = option(8, "Bits of an embedding of its own; 0 keeps it.", choices=(0, *_BITS))
    min_rows: int = option(8, "Matrices with fewer rows than this are kept.", low=1)
    skip: str = option("", "Weights to keep: name patterns such as *.down_proj.weight, separated by commas.")
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept."""
        graph = program.copy_graph()
        self._check_patterns(program)
        roles = weight_roles(graph, program)
        readers = weight_nodes(graph)
        choices = {name: self._choose(name, role, program.weights[name]) for name, role in roles.items()}
        added: dict[str, Expr] = {}
        for name, choice in choices.items():
            if choice.scheme is not None and roles[name] is not Role.expert:
                added |= quantize_matrix(graph, readers[name], choice.scheme, program.weights[name])
        for moe in calls(graph, MOE):
            added |= _quantize_mixture(graph, moe, program, choices)
        erase_dead(graph)
        misses = tuple(
            f"{name}: it is read by something other than a linear, a table or one mixture of experts"
            for name in _large(program)
            if name not in roles
        )
        decisions = tuple(
            Decision(
                subject=name, choice=choice.scheme.name if choice.scheme else "kept", reason=choice.reason
            )
            for name, choice in choices.items()
        )
        matches = sum(choice.scheme is not None for choice in choices.values())
        done = program.replace(graph=graph, weights=program.weights.with_entries(added))
        report = PassReport(matches=matches, decisions=decisions, misses=misses)
        return PassResult(program=done, report=report)

    def _choose(self, name: str, role: Role, expr: Expr) -> _Choice:
        pattern = next((pattern for pattern in self._patterns() if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            return _Choice(None, f"it matches skip pattern {pattern!r}")
        if not expr.dtype.is_floating_point:
            return _Choice(None, f"its values are {expr.dtype} already")
        if role is Role.router:
            return _Choice(None, "it chooses experts, and a rounded weight may choose others")
        bits = self._bits_for(role)
        if bits == 0:
            return _Choice(None, f"{role.value}: to be kept")
        rows, width = expr.shape[-2:]
        if rows < self.min_rows:
            return _Choice(None, f"it has {rows} rows, fewer than {self.min_rows}")
        group = self.group_size if width > self.group_size else 0
        scheme = QuantScheme(bits=bits, group_size=group, symmetric=self.symmetric)
        return _Choice(scheme, role.value + _shape_note(width, self.group_size))

    def _patterns(self) -> list[str]:
        return [pattern.strip() for pattern in self.skip.split(",") if pattern.strip()]

    def _check_patterns(self, program: Program) -> None:
        names = list(program.used_weights())
        for pattern in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.3)
                raise RecipeError(
                    "rtn.skip",
                    f"Skip pattern {pattern!r} matches no weight.",
                    f"The closest weights are: {', '.join(close or names[:3])}.",
                    "Correct rtn.skip; names are those after the passes before it, fused ones included.",
                )

    def _bits_for(self, role: Role) -> int:
        if role in (Role.head, Role.tied):
            return self.head_bits
        return self.embedding_bits if role is Role.embedding else self.bits


class _Choice(NamedTuple):
    """The scheme of one weight, or None to keep it, and why."""

    scheme: QuantScheme | None
    reason: str


def _shape_note(width: int, group_size: int) -> str:
    if group_size and width <= group_size:
        return f"; its {width} inputs are one group"
    if group_size and width % group_size:
        return f"; the last group of each row has {width % group_size} weights"
    return ""


def _quantize_mixture(
    graph: fx.Graph, moe: fx.Node, program: Program, choices: dict[str, _Choice]
) -> dict[str, Expr]:
    """Quantise both expert weights of `moe` or neither, and put the reason in `choices`."""
    names = [str(argument(moe, part).target) for part in ("gate_up", "down")]
    schemes = [choices[name].scheme if name in choices else None for name in names]
    if schemes[0] is not None and schemes[1] is not None:
        return quantize_experts(graph, moe, program, schemes[0], schemes[1])
    for name, scheme in zip(names, schemes, strict=True):
        if scheme is not None:
            choices[name] = _Choice(None, "the other weight of its experts is kept")
    return {}


def _large(program: Program) -> list[str]:
    """Matrices that hold at least one in a hundred parameters."""
    counts = {name: num_parameters(program.weights[name]) for name in program.used_weights()}
    least = sum(counts.values()) / 100
    return [name for name in counts if counts[name] >= least and len(program.weights[name].shape) > 1]
