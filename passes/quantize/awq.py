"""Make columns that meet large inputs larger before they are rounded, and their inputs smaller (AWQ).

    n = llmc.rms_norm(x, g, …)            n = llmc.rms_norm(x, g / s, …)
    y = llmc.linear(n, w, None)      →    y = llmc.linear(n, w * s, None)

Where scales can be folded is what `smooth` finds: behind norms and gated activations. They are powers of
two, so moving them rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...ir.weights import Expr
from ...spec.history import Decision
from ...spec.quant import QuantScheme
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
from ..calibration import Calibration, first_tokens
from .finite import finite_weight
from .needs import require_calibration
from .salience import search_salience
from .segments import product_sites
from .smooth import fold_factors, foldable_sites
from .walk import Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Activation-aware scaling of the inputs of linears, folded into what makes them."""

    name: ClassVar[str] = "awq"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Within(1e-5)
    calibrated: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    bits: int = option(4, "Bits that the weights are to be rounded to.", choices=(3, 4, 8))
    group_size: int = option(128, "Group size that they are to be rounded in.", choices=(0, 32, 64, 128))
    symmetric: bool = option(True, "Whether they are to be rounded around zero.")
    least_gain: float = option(
        0.1,
        "Part of the error that scaling must save to be done; less is saved by what rounds as well.",
        low=0,
        high=1,
    )
    tokens: int = option(
        4096, "Calibration tokens to see how large inputs are, whole sequences at least.", low=32
    )
    steps: int = option(20, "Steps of the grid over the exponent.", low=1, high=100)
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per value whose channels may be scaled; a decision for each says by which exponent."""
        graph = program.copy_graph()
        sites, misses = foldable_sites(graph, program)
        if context.planning or not sites:
            return PassResult(program=program, report=PassReport(matches=len(sites), misses=tuple(misses)))
        why = "It scales inputs by how large they are, and the compile was given no tokens."
        fix = "Give the pass context a Calibration, or leave the pass out."
        calibration = first_tokens(require_calibration(self.name, context, why, fix), self.tokens)
        copied = program.replace(graph=graph)
        powers = _powers(copied, [site.value for site in sites], calibration)
        scheme = QuantScheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        changed: dict[str, Expr] = {}
        decisions: list[Decision] = []
        for site in sites:
            weights = [finite_weight(program, name) for name in site.readers]
            found = search_salience(weights, powers[site.value], scheme, steps=self.steps)
            scaled = found.error < (1 - self.least_gain) * found.plain_error
            if scaled:
                fold_factors(program, site, found.scales, changed)
            choice = f"exponent {found.exponent:g}" if scaled else "not scaled"
            reason = f"relative error {found.error:.3g}, without {found.plain_error:.3g}"
            decisions.append(Decision(subject=", ".join(site.readers), choice=choice, reason=reason))
        done = copied.replace(weights=program.weights.with_entries(changed))
        report = PassReport(matches=len(sites), decisions=tuple(decisions), misses=tuple(misses))
        return PassResult(program=done, report=report)


def _powers(program: Program, values: Sequence[fx.Node], calibration: Calibration) -> dict[fx.Node, Tensor]:
    """The mean square of each channel of `values`."""
    wanted, found = frozenset(values), dict[fx.Node, Tensor]()
    walk = Walk(program, product_sites(program.graph), calibration)
    try:
        for segment in walk.segments:
            if segment.x is not None and segment.x in wanted:
                batches = [value.flatten(0, -2) for value in walk.values(segment.x)]
                total = torch.stack([batch.square().sum(0) for batch in batches]).sum(0)
                found[segment.x] = total / sum(len(batch) for batch in batches)
            walk.advance(segment, {})
            calibration.watch(segment.index + 1, len(walk.segments), "how large inputs are")
    finally:
        walk.close()
    return found
