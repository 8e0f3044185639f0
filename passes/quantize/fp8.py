"""Weights as 8-bit floats (e4m3), and the inputs of their products too.

    w = weight a.weight                        c = weight a.weight.codes
    y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                y = llmc.quantized_linear(x, c, s, None, None, 'fp8_channel', 'fp8_token')

For hardware that multiplies such numbers. Head and embedding stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ...spec.errors import RecipeError
from ...spec.quant import parse_scheme
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
from .needs import require_calibration
from .replace import Role, parts_of
from .round_inputs import RoundInputs
from .selection import Choice, WeightOptions, decisions_on, misses_of, replace_weights
from .static_inputs import SCHEME as STATIC
from .static_inputs import round_statically, static_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """Round-to-nearest e4m3 weights of linears and experts, inputs rounded as the step runs."""

    name: ClassVar[str] = "fp8"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    provides: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    contract: ClassVar[Contract] = Lossy()

    weights: str = option(
        "fp8_channel",
        "Which weights share a scale: a row, or a block of rows and columns.",
        choices=("fp8_channel", "fp8_b128x128"),
    )
    inputs: str = option(
        "fp8_token",
        "How inputs are rounded: by token as the step runs, or by a scale a product that calibration finds; "
        "nothing keeps them in the compute dtype.",
        choices=("", "fp8_token", "fp8_static"),
    )
    skip: str = option("", "Weights to keep: name patterns such as *.down_proj.weight, separated by commas.")
    expect: int = expect_option()

    def __post_init__(self) -> None:
        """Raises RecipeError for a scale a product beside scales a block, for which nothing has a kernel."""
        if self.calibrated and self.weights != "fp8_channel":
            raise RecipeError(
                "fp8.inputs",
                f"Inputs cannot be rounded as {self.inputs} before weights in the scheme {self.weights}.",
                "Where weights have scales a block, inputs have scales of their own, found as the step runs.",
                "Set fp8.weights=fp8_channel, or fp8.inputs=fp8_token.",
            )

    @property
    def calibrated(self) -> bool:
        """Whether the pass looks at activations."""
        return self.inputs == STATIC.name

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per weight; a decision for each says its scheme, or why it is kept."""
        graph = program.copy_graph()
        scheme = parse_scheme(self.weights)
        options = _Options(bits=8, group_size=0, head_bits=0, embedding_bits=0, skip=self.skip)
        choices = {
            name: choice._replace(scheme=None if choice.scheme is None else scheme)
            for name, choice in options.choices(graph, program).items()
        }
        done = replace_weights(program, graph, choices, parts_of)
        if self.calibrated:
            graph = done.copy_graph()
            added = round_statically(graph, self._scales(program, choices, context))
            done = done.replace(graph=graph, weights=done.weights.with_entries(added))
        if self.inputs:
            # by token where a product has no scale of its own: experts
            done = RoundInputs(scheme="fp8_token").run(done, context).program
        report = PassReport(
            matches=sum(choice.scheme is not None for choice in choices.values()),
            decisions=decisions_on(choices),
            misses=misses_of(program, choices),
        )
        return PassResult(program=done, report=report)

    def _scales(
        self, program: Program, choices: Mapping[str, Choice], context: PassContext
    ) -> dict[str, float]:
        names = [
            name
            for name, choice in choices.items()
            if choice.scheme is not None and choice.role is not Role.expert
        ]
        if context.planning:
            return dict.fromkeys(names, 1.0)
        why = "It rounds inputs by how large they get, and the compile was given no tokens."
        fix = "Give the pass context a Calibration, or set fp8.inputs=fp8_token."
        return static_scales(program, names, require_calibration(self.name, context, why, fix))


class _Options(WeightOptions):
    """The choice of weights that all quantisers share, under this pass's name."""

    name: ClassVar[str] = "fp8"
