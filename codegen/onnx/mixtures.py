"""Which mixtures of experts ONNX Runtime's QMoE computes as the program says. Knows nodes, makes none.

The operator's CPU kernel takes gates and their partners in alternating rows, reads 4-bit codes with float32
inputs (8-bit ones always with inputs rounded to int8), and leaves out experts whose share is not positive.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ...ir import ops as _registered  # noqa: F401 # pyright: ignore[reportUnusedImport] - registers them
from ...ir.arguments import argument
from ...ir.program import Program
from ...spec.quant import QuantScheme, parse_scheme

QUANTIZED_MOE = torch.ops.llmc.quantized_moe.default
# Activations of `llmc.moe` that the operator has, and what it calls them.
QMOE_ACTIVATIONS = {
    "silu": "swiglu",
    "clamped_swiglu": "swiglu",
    "plain:silu": "silu",
    "plain:relu": "relu",
}
# Operators whose result is not negative, whatever they are given.
_NEVER_NEGATIVE = ("aten.softmax", "aten._softmax", "aten.sigmoid", "aten.exp", "aten.relu", "aten.abs")
# Operators whose result is not negative where their first argument (of `cat`, its parts) is not.
_KEEP_SIGN = (
    *("aten.topk", "aten.gather", "aten.sum", "aten.slice", "aten.reshape", "aten.view", "aten.unsqueeze"),
    *("aten.squeeze", "aten._to_copy", "aten.clone", "aten.expand", "aten.transpose", "aten.cat", "getitem"),
)
# Operators whose result is not negative where none of their arguments is.
_KEEP_SIGNS = ("aten.mul", "aten.div", "aten.add")


def misfit(node: fx.Node) -> str:
    """Why QMoE does not compute the `llmc.quantized_moe` call `node`; empty where it does."""
    gate_up, down = (parse_scheme(str(argument(node, f"{name}_scheme"))) for name in ("gate_up", "down"))
    name, width = str(argument(node, "activation")), _width(argument(node, "x"))
    inner = inner_width(node)
    if str(argument(node, "activation_scheme")):
        return "its inputs are rounded"
    if gate_up.bits == 8 or down.bits == 8:
        return "inputs of 8-bit experts would be rounded to int8"
    if name not in QMOE_ACTIVATIONS:
        return f"the operator has no activation {name}"
    block = block_size(node)
    if not {gate_up.group_size, down.group_size} <= {0, block}:
        return "the operator takes one group size for both products"
    if not all(_fits(scheme, block, size) for scheme, size in ((gate_up, width), (down, inner))):
        return "groups must divide rows, and one scale a row comes without a zero point"
    if not is_non_negative(argument(node, "expert_weights")):
        return "shares of experts may be negative"
    return ""


def mixture_notes(program: Program) -> tuple[str, ...]:
    """Which mixtures of `program` QMoE does not compute, and why."""
    reasons = Counter(
        filter(None, (misfit(node) for node in program.graph.nodes if node.target is QUANTIZED_MOE))
    )
    return tuple(f"{count} mixtures of experts are loops, not QMoE: {why}" for why, count in reasons.items())


def block_size(node: fx.Node) -> int:
    """Weights that share a scale in QMoE; 0 where whole rows do. One product may have one scale a row beside
    groups of the other: those become equal scales of its groups."""
    schemes = (parse_scheme(str(argument(node, f"{name}_scheme"))) for name in ("gate_up", "down"))
    return max(scheme.group_size for scheme in schemes)


def inner_width(node: fx.Node) -> int:
    """Elements between an expert's two products."""
    rows = int(argument(node, "gate_up_codes").meta["val"].shape[1])
    return rows if str(argument(node, "activation")).startswith("plain:") else rows // 2


def is_to_be_interleaved(node: fx.Node) -> bool:
    """Whether the rows of gates and partners, one half after the other, must be stored alternating."""
    has_gate = QMOE_ACTIVATIONS.get(str(argument(node, "activation"))) == "swiglu"
    return has_gate and not argument(node, "interleaved")


def is_non_negative(value: Any) -> bool:
    """Whether no element of `value`, a node or number, can be negative, by the operators that made it."""
    if isinstance(value, (int, float)):
        return value >= 0
    if isinstance(value, (list, tuple)):
        return all(map(is_non_negative, value))
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    stem = str(value.target).rpartition(".")[0] if isinstance(value.target, OpOverload) else "getitem"
    if stem in _NEVER_NEGATIVE:
        return True
    if stem in _KEEP_SIGN:
        return is_non_negative(value.args[0])
    if stem == "aten.clamp":
        low: Any = value.args[1] if len(value.args) > 1 else None
        return isinstance(low, (int, float)) and low >= 0
    return stem in _KEEP_SIGNS and all(map(is_non_negative, value.args))


def _fits(scheme: QuantScheme, block: int, width: int) -> bool:
    return (scheme.group_size > 0 or scheme.symmetric) and (block == 0 or width % block == 0)


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])
