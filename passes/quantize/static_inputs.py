"""Round the inputs of products whose weights are codes by one scale a product, found by calibration tokens.

    y = llmc.quantized_linear(x, c, s, None, None, 'fp8_channel')
                                    ↓
    y = llmc.quantized_linear(x, c, s, None, None, 'fp8_channel', 'fp8_static', a)

The scale `a` is a weight of its own, `NAME.activation_scale`. Mixtures of experts have no operand for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from ...ir.program import Program
from ...ir.weights import Constant, Expr
from ...spec.quant import ActivationScheme
from ..calibration import Calibration
from ..fuse_linears import LINEAR
from ..graph import argument, argument_names, calls, is_weight, read_weight, weight_nodes
from .ranges import channel_ranges
from .replace import QUANTIZED_LINEAR

SCHEME = ActivationScheme(codes="fp8", static=True)


def static_scales(program: Program, names: Iterable[str], calibration: Calibration) -> dict[str, float]:
    """By weight name the scale with which the largest input of its linears over all calibration tokens takes
    the largest code; 1 where no token activates any. `program` is not quantised yet."""
    wanted = set(names)
    graph = program.copy_graph()
    inputs: dict[str, list[fx.Node]] = {}
    for linear in calls(graph, LINEAR):
        weight = argument(linear, "weight")
        if is_weight(weight) and str(weight.target) in wanted:
            inputs.setdefault(str(weight.target), []).append(argument(linear, "x"))
    nodes = {node for found in inputs.values() for node in found}
    ranges = channel_ranges(program.replace(graph=graph), nodes, calibration)
    largest = {name: max(float(ranges[node].max()) for node in found) for name, found in inputs.items()}
    return {name: value / SCHEME.top if value > 0 else 1.0 for name, value in largest.items()}


def round_statically(graph: fx.Graph, scales: Mapping[str, float]) -> dict[str, Expr]:
    """Let the products of `graph` that read the codes of these weights round their inputs by these scales;
    returns the weights that are new."""
    added: dict[str, Expr] = {}
    readers = weight_nodes(graph)
    for name, scale in scales.items():
        codes = readers[f"{name}.codes"]
        added[f"{name}.activation_scale"] = Constant(torch.tensor([scale], dtype=torch.float32))
        with graph.inserting_before(codes):
            operand = read_weight(graph, f"{name}.activation_scale")
        for product in [user for user in codes.users if user.target is QUANTIZED_LINEAR]:
            before = argument_names(product)[: argument_names(product).index("activation")]
            product.args = (*(argument(product, part) for part in before), SCHEME.name, operand)
    return added
