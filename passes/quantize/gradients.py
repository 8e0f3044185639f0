"""Run a program so that gradients reach its weights. Knows operators; knows no scheme and no loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...ir.ops import activation, attention, moe, norm, rope
from ...ir.program import Program
from .walk import is_plain, plain_attention, run_nodes

_PLAIN = (
    norm.rms_norm,
    norm.layer_norm,
    rope.rope,
    activation.gated_activation,
    activation.gated_activation_packed,
    activation.softcap,
    moe.moe,
)


class LogitsRun:
    """A program that is run for its logits in float32, as often as is wanted."""

    def __init__(self, program: Program) -> None:
        self._nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self._output: fx.Node = next(node for node in program.graph.nodes if node.op == "output").args[0]
        self._functions = _differentiable()

    def logits(
        self, inputs: Mapping[str, Tensor], weight: Callable[[str], Tensor], *, gradients: bool
    ) -> Tensor:
        """Logits of the rows that `inputs` ask for, weights read through `weight`."""
        found = run_nodes(self._nodes, {}, inputs, weight, self._functions, gradients=gradients)
        logits: Tensor = found[self._output]
        return logits


def _differentiable() -> dict[Any, Callable[..., Any]]:
    """Operators as functions that autograd sees through; those of ATen and plain products need none."""
    named = torch.ops.llmc
    return {operator.overload: operator.function for operator in _PLAIN} | {
        named.attention.default: _attention,
        named.embedding.default: F.embedding,
        named.gather_rows.default: _gather_rows,
        named.add_rms_norm.default: partial(_add_norm, norm.rms_norm.function),
        named.add_layer_norm.default: partial(_add_norm, norm.layer_norm.function),
    }


def _gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows)


def _add_norm(
    function: Callable[..., Tensor], x: Tensor, residual: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return function(total, *rest), total


def _attention(*args: Any) -> Tensor:
    if is_plain(args):
        return plain_attention(*args[:4], scale=args[7])
    return attention.attention.function(*args)
