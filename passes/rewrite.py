"""What rewrites of ATen regions share: operators by name and kind, shapes with symbols, insertion.

Knows how ATen operators treat dimensions; knows no model and no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

Dim = int | torch.SymInt

aten = torch.ops.aten
llmc = torch.ops.llmc

# Operators whose result at an index depends on their operands at that index alone (after broadcasting).
ELEMENTWISE = frozenset(
    """
    _to_copy abs add addcmul alias bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min
    clone complex contiguous cos detach div elu eq erf exp expm1 floor floor_divide full_like ge gelu
    gt hardtanh hypot imag isinf isnan le leaky_relu lift_fresh_copy log log1p logical_and logical_not
    logical_or lt masked_fill maximum minimum mish mul ne neg ones_like polar pow real reciprocal relu
    remainder round rsqrt rsub sigmoid sign silu sin softplus sqrt square sub tanh to type_as where
    zeros_like llmc.gated_activation llmc.softcap
    """.split()  # noqa: SIM905
)

# Operators that read and write along the last dimension of their first tensor operand alone.
LAST_DIM = frozenset(
    "llmc.rms_norm llmc.layer_norm llmc.linear llmc.quantized_linear llmc.gated_activation_packed".split()  # noqa: SIM905
)

# Operators that give their input's elements in the same order under another shape.
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})

# Operators that give their input unchanged where dtype stays the same.
COPIES = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh_copy"})
CASTS = frozenset({"_to_copy", "to", "type_as"})


def operator_of(node: Any) -> str:
    """`mul` for any overload of an ATen operator, `llmc.rope` for ours, `getitem`; "" for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        namespace, name = node.target.name().split(".")[0].split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return str(getattr(node.target, "__name__", ""))


def argument_names(operator: OpOverload) -> list[str]:
    """The names of an operator's arguments, in order."""
    return [entry.name for entry in operator._schema.arguments]  # pyright: ignore[reportPrivateUsage]


def is_elementwise(node: fx.Node) -> bool:
    """Whether the result at an index depends on the operands at that index alone, after broadcasting."""
    return operator_of(node) in ELEMENTWISE or node.target in (aten.min.other, aten.max.other)


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a node that gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def shape_of(node: fx.Node) -> tuple[Dim, ...]:
    """Shape of a tensor node, symbolic sizes included."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of a tensor node."""
    return node.meta["val"].dtype


def rank_of(node: fx.Node) -> int:
    """Number of dimensions of a tensor node."""
    return len(node.meta["val"].shape)


def is_one(dim: Dim) -> bool:
    """Whether a size is 1 for every step; asks nothing of symbols."""
    return isinstance(dim, int) and dim == 1


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two sizes are equal for every step; adds no constraint on symbols."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def counted(shape: Sequence[Dim]) -> list[Dim]:
    """The sizes of `shape` that are not 1."""
    return [dim for dim in shape if not is_one(dim)]


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are equal for every step."""
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def reshape_sizes(shape: Sequence[Dim]) -> list[int] | None:
    """`shape` as an argument of reshape, -1 for its one symbolic size; None when there are several."""
    symbolic = [dim for dim in shape if not isinstance(dim, int)]
    if len(symbolic) > 1 or (symbolic and 0 in shape):
        return None
    return [dim if isinstance(dim, int) else -1 for dim in shape]


def at(dim: int, rank: int) -> int:
    """A dimension index counted from the front."""
    return dim + rank if dim < 0 else dim


def insert(
    graph: fx.Graph, operator: OpOverload, args: tuple[Any, ...], like: Any = None, **kwargs: Any
) -> fx.Node:
    """A call at the graph's insertion point, named after its operator; `like` is its value where known."""
    name = operator.name().split("::")[-1].split(".")[0]
    node = graph.create_node("call_function", operator, args, kwargs, name=name)
    if like is not None:
        node.meta["val"] = like
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` but `new` itself read `new`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
