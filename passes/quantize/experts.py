"""Codes of a mixture's experts: each by the tokens that are routed to it, and by others where those are few.

An expert that too few tokens reach is also shown tokens that were routed elsewhere, so that rare experts are
calibrated too; which got none of their own is said.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ...ir.ops.moe import expert_hidden
from ...ir.program import Program
from ...ir.quantized import QTensor, dequantize_rows
from ...spec.history import LayerError
from ...spec.quant import QuantScheme
from ..graph import argument
from .finite import finite_weight
from .linears import Inputs, Streams
from .moments import SecondMoments
from .rounding import Method
from .selection import Choice, scheme_of
from .solved import Result
from .walk import raised

# Fewest tokens that an expert is calibrated on, where there are as many.
_FEWEST_TOKENS = 256


def solve_experts(
    program: Program, streams: Streams, moe: fx.Node, choices: Mapping[str, Choice], method: Method
) -> dict[str, Result]:
    """Results for both stacks of weights of the mixture `moe`, which starts the segment that comes next.

    Experts make up for no drift: which tokens are theirs drifts as well.
    """
    names = [str(argument(moe, part).target) for part in ("gate_up", "down")]
    schemes = [scheme_of(choices[name]) for name in names]
    stacks = [finite_weight(program, name) for name in names]
    x_TD = torch.cat(list(streams.now.values(argument(moe, "x"))))
    ids_TC = torch.cat(list(streams.now.values(argument(moe, "expert_ids"))))
    bias = argument(moe, "gate_up_bias")
    biases = raised(program.weights.evaluate(str(bias.target))) if isinstance(bias, fx.Node) else None
    found: list[list[Result]] = [[], []]
    unrouted: list[int] = []
    for expert in range(stacks[0].shape[0]):
        rows, routed = _rows_for(ids_TC, expert)
        if not routed:
            unrouted.append(expert)
        own = x_TD[rows].float()
        first = _inputs(own, method).solve(names[0], stacks[0][expert], schemes[0])
        gate_up = _values(first.tensor, schemes[0], stacks[0].shape[-1])
        hidden = _hidden(moe, own, gate_up, None if biases is None else biases[expert])
        second = _inputs(hidden, method).solve(names[1], stacks[1][expert], schemes[1])
        found[0].append(first)
        found[1].append(second)
    note = _note(unrouted, stacks[0].shape[0])
    return {name: _stacked(name, results, note) for name, results in zip(names, found, strict=True)}


def _rows_for(ids_TC: Tensor, expert: int) -> tuple[Tensor, int]:
    """The tokens to calibrate an expert on, its own first, and how many are its own."""
    own = (ids_TC == expert).any(1)
    rows = own.nonzero()[:, 0]
    missing = _FEWEST_TOKENS - len(rows)
    if missing <= 0:
        return rows, len(rows)
    others = (~own).nonzero()[:, 0]
    step = max(1, len(others) // missing)
    return torch.cat([rows, others[::step][:missing]]), len(rows)


def _inputs(rows_TK: Tensor, method: Method) -> Inputs:
    moments = SecondMoments(rows_TK.shape[1])
    moments.observe(rows_TK)
    return Inputs(moments.gram(), method)


def _hidden(moe: fx.Node, x_TD: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    names = ("activation", "interleaved", "alpha", "limit")
    activation, interleaved, alpha, limit = (argument(moe, name) for name in names)
    return expert_hidden(x_TD, gate_up, bias, activation, interleaved, alpha, limit, "")


def _values(tensor: QTensor, scheme: QuantScheme, width: int) -> Tensor:
    return dequantize_rows(*tensor, scheme, width)


def _stacked(name: str, results: list[Result], note: str) -> Result:
    """One result for a stack: experts joined, errors as their mean."""
    zeros = [result.tensor.zeros for result in results if result.tensor.zeros is not None]
    tensor = QTensor(
        torch.stack([result.tensor.codes for result in results]),
        torch.stack([result.tensor.scales for result in results]),
        torch.stack(zeros) if zeros else None,
    )
    error = LayerError(
        subject=name,
        error=sum(result.error.error for result in results) / len(results),
        nearest_error=sum(result.error.nearest_error for result in results) / len(results),
    )
    return Result(tensor, error, note)


def _note(unrouted: list[int], count: int) -> str:
    if not unrouted:
        return ""
    listed = ", ".join(map(str, unrouted[:8])) + (" …" if len(unrouted) > 8 else "")
    return (
        f"{len(unrouted)} of {count} experts ({listed}) were chosen by no calibration token and "
        "were calibrated on tokens of others"
    )
