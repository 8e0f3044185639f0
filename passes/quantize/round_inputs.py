"""Round the inputs of products whose weights are codes.

    y = llmc.quantized_linear(x, c, s, None, None, 'int8_channel')
                                    ↓
    y = llmc.quantized_linear(x, c, s, None, None, 'int8_channel', 'int8_token')

Scales are found as the step runs. Products with floating-point weights stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...ir.program import Program
from ...spec.history import Decision
from ..base import (
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
from ..graph import argument, argument_names, calls
from .replace import QUANTIZED_LINEAR, QUANTIZED_MOE

_SCHEMES = ("int8_token", "int8_g32", "int8_g64", "int8_g128", "int16_g32", "fp8_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundInputs:
    """Dynamic rounding of activations before products with codes."""

    name: ClassVar[str] = "round_inputs"
    stage: ClassVar[Stage] = Stage.quantise
    requires: ClassVar[frozenset[str]] = frozenset({QUANTIZED})
    provides: ClassVar[frozenset[str]] = frozenset()
    contract: ClassVar[Contract] = Lossy()

    scheme: str = option(
        "int8_token", "How inputs are rounded.", choices=_SCHEMES, search=("int8_token", "int8_g32")
    )
    head: bool = option(False, "Round the input of the output head, too.")
    expect: int = expect_option()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """One match per product. Inputs that are rounded already stay so."""
        graph = program.copy_graph()
        decisions: list[Decision] = []
        for node in calls(graph, QUANTIZED_LINEAR, QUANTIZED_MOE):
            is_linear = node.target is QUANTIZED_LINEAR
            name = "activation" if is_linear else "activation_scheme"
            codes = str(argument(node, "codes" if is_linear else "gate_up_codes").target)
            if argument(node, name) or (not self.head and is_linear and _is_head(node, program)):
                continue
            _set(node, name, self.scheme)
            decisions.append(Decision(subject=codes, choice=f"inputs {self.scheme}", reason="as asked"))
        report = PassReport(matches=len(decisions), decisions=tuple(decisions))
        return PassResult(program=program.replace(graph=graph), report=report)


def _is_head(node: fx.Node, program: Program) -> bool:
    return node.meta["val"].shape[-1] == program.spec.vocab_size


def _set(node: fx.Node, name: str, value: str) -> None:
    """Write a trailing argument, with the defaults of those before it."""
    names = argument_names(node)
    args = [argument(node, before) for before in names[: names.index(name)]]
    node.args = (*args, value, *node.args[len(args) + 1 :])
