"""Which weights get which scheme: the options that every pass which rounds weights has, and what follows
from them. Finds no codes."""

from __future__ import annotations

from collections.abc import Mapping
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
from ..base import expect_option, option
from ..bits import num_parameters
from ..graph import argument, calls, erase_dead, weight_nodes
from .replace import MOE, PartsOf, Role, quantize_experts, quantize_matrix, weight_roles

_BITS = (3, 4, 8)


class Choice(NamedTuple):
    """The scheme of one weight, or None to keep it, what the weight is for, and why."""

    scheme: QuantScheme | None
    role: Role
    reason: str


def scheme_of(choice: Choice) -> QuantScheme:
    """The scheme of a weight that was chosen to be rounded."""
    assert choice.scheme is not None
    return choice.scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOptions:
    """The options of a pass that rounds weights."""

    name: ClassVar[str]

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

    def choices(self, graph: fx.Graph, program: Program) -> dict[str, Choice]:
        """A choice for every weight that has a role; experts of one mixture are quantised together or not
        at all. Raises RecipeError for a skip pattern that matches nothing."""
        self._check_patterns(program)
        roles = weight_roles(graph, program)
        found = {name: self._choose(name, role, program.weights[name]) for name, role in roles.items()}
        for moe in calls(graph, MOE):
            names = [str(argument(moe, part).target) for part in ("gate_up", "down")]
            schemes = [found[name].scheme if name in found else None for name in names]
            if None in schemes:
                for name, scheme in zip(names, schemes, strict=True):
                    if scheme is not None:
                        found[name] = Choice(None, Role.expert, "the other weight of its experts is kept")
        return found

    def _choose(self, name: str, role: Role, expr: Expr) -> Choice:
        pattern = next((pattern for pattern in self._patterns() if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            return Choice(None, role, f"it matches skip pattern {pattern!r}")
        if not expr.dtype.is_floating_point:
            return Choice(None, role, f"its values are {expr.dtype} already")
        if role is Role.router:
            return Choice(None, role, "it chooses experts, and a rounded weight may choose others")
        bits = self._bits_for(role)
        if bits == 0:
            return Choice(None, role, f"{role.value}: to be kept")
        rows, width = expr.shape[-2:]
        if rows < self.min_rows:
            return Choice(None, role, f"it has {rows} rows, fewer than {self.min_rows}")
        group = self.group_size if width > self.group_size else 0
        scheme = QuantScheme(bits=bits, group_size=group, symmetric=self.symmetric)
        return Choice(scheme, role, role.value + _shape_note(width, self.group_size))

    def _patterns(self) -> list[str]:
        return [pattern.strip() for pattern in self.skip.split(",") if pattern.strip()]

    def _check_patterns(self, program: Program) -> None:
        names = list(program.used_weights())
        for pattern in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.3)
                raise RecipeError(
                    f"{self.name}.skip",
                    f"Skip pattern {pattern!r} matches no weight.",
                    f"The closest weights are: {', '.join(close or names[:3])}.",
                    f"Correct {self.name}.skip; names are those after the passes before it, fused ones too.",
                )

    def _bits_for(self, role: Role) -> int:
        if role in (Role.head, Role.tied):
            return self.head_bits
        return self.embedding_bits if role is Role.embedding else self.bits


def _shape_note(width: int, group_size: int) -> str:
    if group_size and width <= group_size:
        return f"; its {width} inputs are one group"
    if group_size and width % group_size:
        return f"; the last group of each row has {width % group_size} weights"
    return ""


def replace_weights(
    program: Program, graph: fx.Graph, choices: Mapping[str, Choice], parts: PartsOf
) -> Program:
    """`program` with `graph`, which is edited, reading codes wherever `choices` has a scheme; `parts` gives
    the stored parts of each weight."""
    readers = weight_nodes(graph)
    added: dict[str, Expr] = {}
    for name, choice in choices.items():
        if choice.scheme is not None and choice.role is not Role.expert:
            added |= quantize_matrix(graph, readers[name], choice.scheme, program.weights[name], parts)
    for moe in calls(graph, MOE):
        first, second = (
            choices[name].scheme if name in choices else None
            for name in (str(argument(moe, part).target) for part in ("gate_up", "down"))
        )
        if first is not None and second is not None:
            added |= quantize_experts(graph, moe, program, (first, second), parts)
    erase_dead(graph)
    return program.replace(graph=graph, weights=program.weights.with_entries(added))


def decisions_on(
    choices: Mapping[str, Choice], notes: Mapping[str, str] | None = None
) -> tuple[Decision, ...]:
    """What was chosen for each weight and why, with what `notes` add about some."""
    return tuple(
        Decision(
            subject=name,
            choice=choice.scheme.name if choice.scheme else "kept",
            reason="; ".join(text for text in (choice.reason, (notes or {}).get(name)) if text),
        )
        for name, choice in choices.items()
    )


def misses_of(program: Program, choices: Mapping[str, Choice]) -> tuple[str, ...]:
    """Large matrices that no choice was made on, and why."""
    return tuple(
        f"{name}: it is read by something other than a linear, a table or one mixture of experts"
        for name in _large(program)
        if name not in choices
    )


def _large(program: Program) -> list[str]:
    """Matrices that hold at least one in a hundred parameters."""
    counts = {name: num_parameters(program.weights[name]) for name in program.used_weights()}
    least = sum(counts.values()) / 100
    return [name for name in counts if counts[name] >= least and len(program.weights[name].shape) > 1]
