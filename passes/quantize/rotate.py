"""Turn the residual stream, and the values that attention carries, by orthogonal matrices (QuaRot R1 and R2).

    n = llmc.rms_norm(x, g, …)                 n = llmc.rms_norm(x, 1, …)          x is x R now
    y = llmc.linear(n, w, None)          →     y = llmc.linear(n, (w * g) R, None)
    z = x + llmc.linear(y, v, None)            z = x + llmc.linear(y, R^T v, None)

Norms without a mean give the same for a turned stream, so the function is the same; outliers of single
channels are spread over all. All of it is folded into weights: nothing is added to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from ...ir.coded import is_coded
from ...ir.program import Program
from ...ir.rotated import Rotated
from ...ir.weights import Constant, Expr
from ...spec.errors import RecipeError
from ...spec.history import Decision
from ..base import (
    CANONICAL,
    Contract,
    PassContext,
    PassReport,
    PassResult,
    Stage,
    Within,
    expect_option,
    option,
)
from ..graph import argument, fresh_name, is_weight, read_weight, set_argument
from .residual import EMBEDDING, Heads, NotRotatable, Stream, residual_stream, shared_weights, value_heads

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Random Hadamard rotations, folded offline (QuaRot, arXiv:2404.00456)."""

    name: ClassVar[str] = "rotate"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-4)
    prepares: ClassVar[bool] = True

    stream: bool = option(True, "Turn the residual stream (R1); norms' gains go into the weights behind.")
    values: bool = option(True, "Turn what each head of attention carries (R2).")
    untie: bool = option(False, "Give a head tied to the table a copy of its own, which the stream needs.")
    seed: int = option(0, "Seed of the random signs.", low=0)
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per norm whose gain is folded and per attention. Raises RecipeError, with the reason,
        where the model does not admit a rotation that is asked for."""
        graph = program.copy_graph()
        changed = _Changed(program)
        decisions: list[Decision] = []
        matches = 0
        if self.values:
            heads = _asked("values", lambda: value_heads(graph, program))
            _asked("values", lambda: _turn_values(heads, changed, self.seed + 1))
            matches += len(heads)
            decisions.append(Decision(subject="values", choice="turned", reason=f"{len(heads)} attentions"))
        if self.stream:
            found = _asked("stream", lambda: residual_stream(graph))
            untied = self._untie(graph, found, changed)
            _asked("stream", lambda: _turn_stream(found, changed, self.seed))
            matches += len(found.norms)
            reason = f"{len(found.norms)} norms" + (f"; {untied} is no longer tied" if untied else "")
            decisions.append(Decision(subject="residual stream", choice="turned", reason=reason))
        weights = program.weights.with_entries(changed.entries)
        done = program.replace(graph=graph, weights=weights)
        return PassResult(program=done, report=PassReport(matches=matches, decisions=tuple(decisions)))

    def _untie(self, graph: fx.Graph, found: Stream, changed: _Changed) -> str:
        """Let the head read a weight of its own where it shares the table; gives its name, "" where it did
        before."""
        for index, read in enumerate(found.reads):
            if not any(user.target is EMBEDDING for user in read.weight.users):
                continue
            if not self.untie:
                raise _refused(
                    "stream",
                    f"The head and the table share {read.weight.target}, and the gain of the last norm would "
                    "go into one of them alone.",
                    "Give the head a copy of its own (--set rotate.untie=true), which costs its bytes, or "
                    "leave the stream as it is (--set rotate.stream=false).",
                )
            name = fresh_name(changed.program, f"{read.weight.target}.head")
            changed.entries[name] = changed.current(str(read.weight.target))
            with graph.inserting_before(read.user):
                own = read_weight(graph, name)
            own.meta.update(read.weight.meta)
            set_argument(read.user, "weight", own)
            found.reads[index] = read._replace(weight=own)
            return name
        return ""


class _Changed:
    """Weights as they become, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.entries: dict[str, Expr] = {}

    def current(self, name: str) -> Expr:
        """What the weight is by now."""
        return self.entries[name] if name in self.entries else self.program.weights[name]

    def turn(self, name: str, dim: int, size: int, seed: int, **more: Any) -> None:
        """Turn the weight along `dim`."""
        current = self.current(name)
        if is_coded(current):
            raise NotRotatable(f"Weight {name} is stored as codes, which turning would lose.")
        bounds: dict[str, Any] = {"start": 0, "stop": current.shape[dim]} | more
        self.entries[name] = Rotated(of=current, dim=dim, size=size, seed=seed, **bounds)


def _turn_values(heads: list[Heads], changed: _Changed, seed: int) -> None:
    rows = {
        (str(node.target), start, stop): entry.size for entry in heads for node, start, stop in entry.writes
    }
    for (name, start, stop), size in rows.items():
        changed.turn(name, 0, size, seed, start=start, stop=stop)
    for name, size in {str(node.target): entry.size for entry in heads for node in entry.reads}.items():
        changed.turn(name, 1, size, seed)


def _turn_stream(found: Stream, changed: _Changed, seed: int) -> None:
    read_by = {str(read.weight.target) for read in found.reads}
    written = {(str(write.weight.target), write.dim) for write in found.writes}
    shared = shared_weights([read.weight for read in found.reads])
    if shared or read_by & {name for name, _ in written}:
        name = min(shared or read_by & {name for name, _ in written})
        raise NotRotatable(f"Weight {name} is read at several places.")
    width = next(changed.current(name).shape[dim] for name, dim in written)
    for read in found.reads:
        _turn_read(read.norm, str(read.weight.target), changed, width, seed)
    for name, dim in sorted(written):
        changed.turn(name, dim, width, seed)
    for norm in found.norms:
        gain = argument(norm, "weight")
        if gain is not None:
            _set_ones(gain, float(argument(norm, "offset")), changed)


def _turn_read(norm: fx.Node, name: str, changed: _Changed, width: int, seed: int) -> None:
    gain: Any = argument(norm, "weight")
    if gain is not None and (not is_weight(gain) or len(gain.users) > 1):
        raise NotRotatable(f"The gain of {norm.name} is computed in the graph or read elsewhere too.")
    folded = None if gain is None else changed.program.weights[str(gain.target)]
    dim = len(changed.current(name).shape) - 1
    changed.turn(name, dim, width, seed, gain=folded, offset=float(argument(norm, "offset")))


def _set_ones(gain: fx.Node, offset: float, changed: _Changed) -> None:
    old = changed.program.weights[str(gain.target)]
    changed.entries[str(gain.target)] = Constant(torch.full(old.shape, 1.0 - offset, dtype=old.dtype))


def _asked(what: str, work: Callable[[], Found]) -> Found:
    try:
        return work()
    except NotRotatable as reason:
        raise _refused(what, str(reason), f"Leave it as it is (--set rotate.{what}=false).") from reason


def _refused(what: str, why: str, fix: str) -> RecipeError:
    subject = "residual stream" if what == "stream" else "values of attention"
    return RecipeError(f"rotate.{what}", f"The {subject} of this model cannot be turned.", why, fix)
