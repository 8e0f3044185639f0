"""Move what makes inputs hard to round into the weights that multiply them (SmoothQuant, arXiv:2211.10438).

    n = llmc.rms_norm(x, w, …)                   n = llmc.rms_norm(x, w / s, …)
    y = llmc.linear(n, v, None)           →      y = llmc.linear(n, v * s, None)

The factors s are powers of two, so that no value of the model is rounded anew; where they save little they
are 1. Whose output feeds linears alone is asked of the graph: norms, and up-projections of gated blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.quantized import dequantize_rows, quantize_rtn
from ...ir.rounded import round_rows
from ...ir.scaled import Scaled
from ...ir.weights import Constant, Expr
from ...spec.history import Decision
from ...spec.quant import ActivationScheme, QuantScheme
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
from ..fuse_linears import LINEAR
from ..graph import argument, argument_names, calls, is_call, is_weight
from .needs import require_calibration
from .ranges import Seen, observe_values

_NORMS = tuple(
    getattr(torch.ops.llmc, name).default
    for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
)
_GATED = (torch.ops.llmc.gated_activation_packed.default, torch.ops.llmc.gated_activation.default)
_LEAST = 1e-5
# How both sides are rounded where it is found out what factors save.
_INPUTS, _WEIGHTS = ActivationScheme(codes="int8"), QuantScheme(bits=8, group_size=0)


class Fold(NamedTuple):
    """A weight or bias whose rows (all, or the last `rows`) give the channels that are scaled."""

    name: str
    rows: int
    offset: float


class Site(NamedTuple):
    """A value that only linears read, the weights that multiply it, and what to divide in turn."""

    value: fx.Node
    readers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smooth:
    """Balance the channels of inputs against those of weights, before both are rounded."""

    name: ClassVar[str] = "smooth"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-5)
    calibrated: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    alpha: float = option(
        0.5,
        "How much of an input channel's magnitude goes to the weights: 0 nothing, 1 all.",
        low=0.0,
        high=1.0,
        search=(0.5, 0.65, 0.8),
    )
    least_gain: float = option(
        0.2,
        "Part of the error of products in 8 bits that balancing must save to be done.",
        low=0,
        high=1,
    )
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per value that may be balanced; decisions say whether it is, misses why another cannot
        be."""
        graph = program.copy_graph()
        sites, misses = foldable_sites(graph, program)
        if context.planning or not sites:
            return PassResult(program=program, report=PassReport(matches=len(sites), misses=tuple(misses)))
        why = "It balances inputs by how large they get, and the compile was given no tokens."
        fix = "Give the pass context a Calibration, or leave the pass out."
        calibration = require_calibration(self.name, context, why, fix)
        copied = program.replace(graph=graph)
        values = observe_values(copied, [site.value for site in sites], calibration)
        changed: dict[str, Expr] = {}
        decisions: list[Decision] = []
        for site in sites:
            weights = [program.weights.evaluate(name).float() for name in site.readers]
            factors = self._factors(weights, values[site.value].top)
            found, plain = (_error(weights, values[site.value], by) for by in (factors, None))
            balanced = found < (1 - self.least_gain) * plain
            if balanced:
                fold_factors(program, site, factors, changed)
            decisions.append(_decision(site, factors if balanced else None, found, plain))
        done = copied.replace(weights=program.weights.with_entries(changed))
        report = PassReport(matches=len(sites), decisions=tuple(decisions), misses=tuple(misses))
        return PassResult(program=done, report=report)

    def _factors(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """The power of two for each channel, 1 where it was never active."""
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        factors = inputs.clamp_min(_LEAST) ** self.alpha / largest.clamp_min(_LEAST) ** (1 - self.alpha)
        factors = torch.where((inputs > 0) & (largest > 0), factors, 1.0)
        middle = factors.log2().median()
        return torch.exp2((factors.log2() - middle).round().clamp(-12, 12))


def _error(weights: Sequence[Tensor], seen: Seen, factors: Tensor | None) -> float:
    """The part of the products with the rows seen that is lost by rounding both sides to 8 bits."""
    by = torch.ones_like(seen.top) if factors is None else factors
    rows = round_rows(seen.rows / by, _INPUTS)
    lost = whole = 0.0
    for weight in weights:
        exact = seen.rows @ weight.T
        coded = quantize_rtn(weight * by, _WEIGHTS)
        rounded = rows @ dequantize_rows(*coded, _WEIGHTS, weight.shape[1]).T
        lost += float((rounded - exact).square().sum())
        whole += float(exact.square().sum())
    return lost / whole if whole else 0.0


def foldable_sites(graph: fx.Graph, program: Program) -> tuple[list[Site], list[str]]:
    """The values whose channels can be scaled and divided where they are made, and why others cannot."""
    sites: list[Site] = []
    misses: list[str] = []
    for node in [*calls(graph, *_NORMS), *calls(graph, *_GATED)]:
        value = _output(node)
        folds = None if value is None else _folds(node)
        readers = () if value is None else _readers(value)
        if value is None or readers is None:
            misses.append(f"{node.name}: something other than linears reads it")
        elif folds is None:
            misses.append(f"{node.name}: what makes it has no weight of its own to divide")
        else:
            sites.append(Site(value, readers, folds))
    return sites, misses


def _output(node: fx.Node) -> fx.Node | None:
    """The normalised or gated value of `node`."""
    if not str(node.target).startswith("llmc.add_"):
        return node
    return next((user for user in node.users if user.args[1] == 0), None)


def _readers(value: fx.Node) -> tuple[str, ...] | None:
    """The weights of the linears that read `value`; None when anything else does."""
    names: list[str] = []
    for user in value.users:
        weight: Any = argument(user, "weight") if is_call(user, LINEAR) else None
        if not is_weight(weight) or len(weight.users) > 1 or argument(user, "x") is not value:
            return None
        names.append(str(weight.target))
    return tuple(names) or None


def _folds(node: fx.Node) -> tuple[Fold, ...] | None:
    """What to divide so that the value of `node` is divided; None where that cannot be."""
    if node.target in _NORMS:
        parts = [argument(node, name) for name in ("weight", "bias") if name in argument_names(node)]
        offsets = [float(argument(node, "offset")), 0.0]
        return _own(parts, offsets, 0)
    width = int(node.meta["val"].shape[-1])
    source: Any = argument(node, "gate_up" if node.target is _GATED[0] else "up")
    if not is_call(source, LINEAR) or len(source.users) > 1:
        return None
    return _own([argument(source, "weight"), argument(source, "bias")], [0.0, 0.0], width)


def _own(parts: list[Any], offsets: list[float], rows: int) -> tuple[Fold, ...] | None:
    folds: list[Fold] = []
    for part, offset in zip(parts, offsets, strict=False):
        if part is not None and (not is_weight(part) or len(part.users) > 1):
            return None
        if part is not None:
            folds.append(Fold(str(part.target), rows, offset))
    return tuple(folds) if parts[0] is not None else None


def fold_factors(program: Program, site: Site, factors: Tensor, changed: dict[str, Expr]) -> None:
    """Put factors into readers and their inverses into what makes the value, on top of earlier ones."""
    inverse = 1.0 / factors
    for name in site.readers:
        current = changed.get(name, program.weights[name])
        changed[name] = Scaled(current, Constant(factors), 1)
    for fold in site.folds:
        current = changed.get(fold.name, program.weights[fold.name])
        missing = current.shape[0] - len(inverse) if fold.rows else 0
        whole = torch.cat([torch.ones(missing), inverse])
        changed[fold.name] = Scaled(current, Constant(whole), 0, fold.offset)


def _decision(site: Site, factors: Tensor | None, found: float, plain: float) -> Decision:
    choice = "left as it is"
    if factors is not None:
        choice = f"divided by powers of two from {float(factors.min()):g} to {float(factors.max()):g}"
    return Decision(
        subject=site.folds[0].name,
        choice=choice,
        reason=f"balanced against {', '.join(site.readers)}: relative error {found:.3g}, without {plain:.3g}",
    )
