"""Weights as 8-bit floats (e4m3), and the inputs of their products too.

    w = weight a.weight                        c = weight a.weight.codes
    y = llmc.linear(x, w, None)           →    s = weight a.weight.scales
                                y = llmc.quantized_linear(x, c, s, None, None, 'fp8_channel', 'fp8_token')

For hardware that multiplies such numbers. Head and embedding stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
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
from .replace import parts_of
from .round_inputs import RoundInputs
from .selection import WeightOptions, decisions_on, misses_of, replace_weights


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
        "How inputs are rounded; nothing keeps them in the compute dtype.",
        choices=("", "fp8_token"),
    )
    skip: str = option("", "Weights to keep: name patterns such as *.down_proj.weight, separated by commas.")
    expect: int = expect_option()

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
        if self.inputs:
            done = RoundInputs(scheme=self.inputs).run(done, context).program
        report = PassReport(
            matches=sum(choice.scheme is not None for choice in choices.values()),
            decisions=decisions_on(choices),
            misses=misses_of(program, choices),
        )
        return PassResult(program=done, report=report)


class _Options(WeightOptions):
    """The choice of weights that all quantisers share, under this pass's name."""

    name: ClassVar[str] = "fp8"
