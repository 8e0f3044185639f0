"""Let products round their inputs to int8 in the blocks of their weights, as ONNX's MatMulNBits can.
Knows which schemes have such blocks; whether it should is asked of `select_kernels`."""

from __future__ import annotations

from torch import fx

from ..ir.program import Program
from ..spec.errors import RecipeError
from ..spec.history import Decision
from ..spec.quant import parse_scheme
from .base import Exact, Lossy, PassReport, PassResult
from .graph import argument, argument_names, calls
from .quantize.replace import QUANTIZED_LINEAR

# Groups that the operator takes as blocks.
_BLOCKS = (16, 32, 64, 128, 256)


def round_by_blocks(program: Program, inputs: str) -> PassResult:
    """`program` with the inputs of its products rounded where `inputs` is `fast`, as they are where it is
    `accurate`; one match per product that could be rounded. The contract is lossy where any is.

    Raises RecipeError for `auto`: what rounding costs is measured for the CPU target's kernels alone.
    """
    if inputs == "auto":
        raise RecipeError(
            "select_kernels.inputs",
            "select_kernels.inputs cannot be auto for the target onnx.",
            "What rounding costs each product is measured for the CPU target's kernels alone.",
            "Choose accurate or fast.",
        )
    fast = inputs == "fast"
    graph = program.copy_graph()
    decisions: list[Decision] = []
    misses: list[str] = []
    for node in calls(graph, QUANTIZED_LINEAR):
        scheme = parse_scheme(str(argument(node, "scheme")))
        if argument(node, "activation"):
            misses.append(f"{node.name}: the checkpoint or the recipe chose {argument(node, 'activation')}")
        elif scheme.code_type != "int" or scheme.group_size not in _BLOCKS:
            misses.append(f"{node.name}: its weights of {scheme.name} have no blocks")
        else:
            activation = f"int8_g{scheme.group_size}" if fast else ""
            reason = "accuracy level 4" if fast else "accuracy level 1: float32 inputs"
            decisions.append(Decision(subject=node.name, choice=activation or "float32", reason=reason))
            _set_activation(node, activation)
    report = PassReport(
        matches=len(decisions),
        decisions=tuple(decisions),
        misses=tuple(misses),
        contract=Lossy() if fast and decisions else Exact(),
    )
    return PassResult(program=program.replace(graph=graph), report=report)


def _set_activation(node: fx.Node, activation: str) -> None:
    values = {name: argument(node, name) for name in argument_names(node)} | {"activation": activation}
    node.args, node.kwargs = tuple(values.values()), {}
