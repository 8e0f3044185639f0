"""Binds a checkpoint to a traced program: each weight becomes a lazy expression over stored tensors.

Loads no tensor but the two of a tie that the checkpoint stores twice, which must be equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ir.program import Program
from ..ir.weights import Cast, Concat, Constant, Expr, Permute, Reshape, Slice, Stack, Unbound
from ..spec.errors import InternalError, ModelError
from .checkpoint import Checkpoint
from .hf.conversion import (
    Conversion,
    Deinterleave,
    JoinParts,
    SplitParts,
    StackParts,
    Step,
    SwapDims,
    plan_conversion,
)
from .quantised.stored import stored_weights

_SHOWN = 3
Shapes = dict[str, tuple[int, ...]]


def bind_checkpoint(program: Program, checkpoint: Checkpoint) -> Program:
    """`program` with every weight an expression over the tensors of `checkpoint`, in the traced dtype.

    Renames, prefixes, stacked experts and the other conversions of transformers are applied as
    expressions. Raises ModelError for tensors that are missing, unexpected, or of another shape,
    and for tied weights that the checkpoint stores twice with different values.
    """
    stored = stored_weights(checkpoint.tensors, checkpoint.form)
    plan = plan_conversion(checkpoint.config, stored)
    needed = {
        name: entry
        for name, entry in program.weights.entries.items()
        if _is_stored(name, entry, plan.state_names)
    }
    shapes = {name: entry.shape for name, entry in needed.items()}
    found: dict[str, Expr] = {}
    for conversion in plan.conversions:
        found.update(_convert(conversion, stored, shapes))
    found = _with_ties(program, found)
    strangers = [name for name in plan.unexpected if stored[name].dtype.is_floating_point]
    _check_presence(checkpoint, needed, found, strangers)
    bound = {name: found[name] for name in needed if name in found}
    _check_shapes(shapes, bound, checkpoint)
    entries = {name: _cast(expr, needed[name].dtype) for name, expr in bound.items()}
    return program.replace(weights=program.weights.with_entries(entries))


def _is_stored(name: str, entry: Expr, state_names: frozenset[str]) -> bool:
    """Parameters are; of the constants only buffers that the model would store."""
    return isinstance(entry, Unbound) or (isinstance(entry, Constant) and name in state_names)


def _convert(conversion: Conversion, stored: Mapping[str, Expr], shapes: Shapes) -> dict[str, Expr]:
    lanes: list[list[Expr]] = [[stored[name] for name in lane] for lane in conversion.lanes]
    for step in conversion.steps:
        lanes = _apply(step, lanes, conversion.targets, shapes)
    if any(len(lane) != 1 for lane in lanes) or len(lanes) != len(conversion.targets):
        raise InternalError(
            "bind.conversion",
            f"The conversion to {', '.join(conversion.targets)} left {len(lanes)} tensors.",
            f"It began with {sum(map(len, conversion.lanes))} stored tensors.",
            "Report the model this happened with.",
        )
    return {target: lane[0] for target, lane in zip(conversion.targets, lanes, strict=True)}


def _apply(step: Step, lanes: list[list[Expr]], targets: tuple[str, ...], shapes: Shapes) -> list[list[Expr]]:
    match step:
        case StackParts(dim):
            return [[_stack(lane, dim, targets[0])] for lane in lanes]
        case JoinParts(dim):
            parts = tuple(part for lane in lanes for part in lane)
            return [[Concat(parts, dim)]]
        case SplitParts(dim, equal):
            whole = _only(lanes, targets[0])
            widths = None if equal else [shapes[target][dim] for target in targets]
            return [[part] for part in _split(whole, dim, widths or len(targets))]
        case SwapDims(first, second, when_needed):
            whole = _only(lanes, targets[0])
            keep = when_needed and whole.shape == shapes.get(targets[0])
            return [[whole if keep else _swap(whole, first, second)]]
        case Deinterleave(dim, inverse):
            return [[_deinterleave(_only(lanes, targets[0]), dim, inverse)]]


def _only(lanes: list[list[Expr]], target: str) -> Expr:
    if len(lanes) == 1 and len(lanes[0]) == 1:
        return lanes[0][0]
    raise ModelError(
        "model.ambiguous_tensors",
        f"{sum(map(len, lanes))} stored tensors claim to be {target!r}.",
        "The conversion from the checkpoint's names takes exactly one.",
        "Check that the weights and config.json belong together.",
    )


def _stack(parts: list[Expr], dim: int, target: str) -> Expr:
    odd = next((part for part in parts if part.shape != parts[0].shape), None)
    if odd is not None:
        raise ModelError(
            "model.tensor_shape",
            f"The stored parts of {target!r} differ in shape: {list(parts[0].shape)} and {list(odd.shape)}.",
            "They are stacked into one tensor, one part an expert.",
            "Check that the weights and config.json belong together.",
        )
    stacked = Stack(tuple(parts))
    rank = len(stacked.shape)
    if dim % rank == 0:
        return stacked
    order = [*range(1, rank)]
    order.insert(dim % rank, 0)
    return Permute(stacked, tuple(order))


def _split(whole: Expr, dim: int, widths: list[int] | int) -> list[Expr]:
    if isinstance(widths, int):
        share = -(-whole.shape[dim] // widths)
        widths = [share] * widths
    parts: list[Expr] = []
    start = 0
    for width in widths:
        stop = min(start + width, whole.shape[dim])
        parts.append(Slice(whole, dim, start, stop))
        start = stop
    return parts


def _swap(of: Expr, first: int, second: int) -> Expr:
    order = list(range(len(of.shape)))
    order[first], order[second] = order[second], order[first]
    return Permute(of, tuple(order))


def _deinterleave(of: Expr, dim: int, inverse: bool) -> Expr:
    half = of.shape[dim] // 2
    paired = (*of.shape[:dim], *((2, half) if inverse else (half, 2)), *of.shape[dim + 1 :])
    return Reshape(_swap(Reshape(of, paired), dim, dim + 1), of.shape)


def _with_ties(program: Program, found: dict[str, Expr]) -> dict[str, Expr]:
    """`found` with the owner of each tie bound from its alias where only the alias is stored.

    Raises ModelError when both are stored and differ: the config then says tied and the weights do not.
    """
    result = dict(found)
    for alias, owner in program.weights.ties.items():
        if owner not in found and alias in found:
            result[owner] = found[alias]
        elif owner in found and alias in found and not _equal(program, found[owner], found[alias]):
            raise ModelError(
                "model.untied_weights",
                f"Weights {owner!r} and {alias!r} differ.",
                "config.json says that they are tied, and the checkpoint stores both.",
                "Set tie_word_embeddings to false in config.json if both are meant.",
            )
    return result


def _equal(program: Program, first: Expr, second: Expr) -> bool:
    if first.shape != second.shape:
        return False
    reader = program.weights.reader
    return torch.equal(first.evaluate(reader), second.evaluate(reader))


def _check_presence(
    checkpoint: Checkpoint, needed: dict[str, Expr], found: dict[str, Expr], strangers: list[str]
) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        also = f" and has {len(strangers)} that the model does not know" if strangers else ""
        raise ModelError(
            "model.missing_tensors",
            f"{len(missing)} of the model's {len(needed)} tensors are missing: {_some(missing)}.",
            f"The checkpoint stores {len(checkpoint.tensors)} tensors{also}.",
            "Check that the weights and config.json belong together.",
        )
    if strangers:
        raise ModelError(
            "model.unexpected_tensors",
            f"{len(strangers)} tensors of the checkpoint belong to nothing: {_some(strangers)}.",
            "The model that config.json describes has no such parameters; ignoring them would change it.",
            "Check that the weights and config.json belong together.",
        )


def _check_shapes(shapes: Shapes, bound: dict[str, Expr], checkpoint: Checkpoint) -> None:
    wrong = [name for name, expr in bound.items() if expr.shape != shapes[name]]
    if wrong:
        name = wrong[0]
        more = f" ({len(wrong)} tensors have another shape)" if len(wrong) > 1 else ""
        raise ModelError(
            "model.tensor_shape",
            f"Tensor {name!r} has shape {list(bound[name].shape)} in the checkpoint{more}.",
            f"The model that config.json of {checkpoint.folder.name} describes needs {list(shapes[name])}.",
            "Check that the weights and config.json belong together.",
        )


def _cast(expr: Expr, dtype: torch.dtype) -> Expr:
    return expr if expr.dtype == dtype else Cast(expr, dtype)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, …"
