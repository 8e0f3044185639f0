"""How each operator behaves when dimension 0 of its operands, known to be 1, is left out.

A rule sees the original call and the lowered operands, and says what to call instead. No rule means that
the operator is called with that dimension put back, which is always correct.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import OpOverload

from .graph import argument
from .rewrite import (
    LAST_DIM,
    argument_names,
    at,
    aten,
    is_elementwise,
    is_one,
    is_tensor,
    operator_of,
    rank_of,
    shape_of,
)

Lowered = Mapping[fx.Node, fx.Node]


@dataclass(frozen=True, slots=True)
class Call:
    """The call that replaces one: `args` hold new nodes. `dropped`: its result lacks the dimension too."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    dropped: bool = True


@dataclass(frozen=True, slots=True)
class Same:
    """The result is an operand as it is lowered."""

    node: fx.Node
    dropped: bool


Outcome = Call | Same | None
Rule = Callable[[fx.Node, "Operands"], Outcome]


class Operands:
    """The operands of one call: `lowered` gives the new node, `is_dropped` whether it lacks dimension 0."""

    def __init__(self, lowered: Lowered, dropped: Mapping[fx.Node, bool]) -> None:
        self._lowered = lowered
        self._dropped = dropped

    def new(self, arg: Any) -> Any:
        """An argument with every node replaced by its lowered form."""
        return fx.map_arg(arg, lambda node: self._lowered[node])

    def is_dropped(self, node: Any) -> bool:
        """Whether the lowered form of `node` lacks dimension 0."""
        return isinstance(node, fx.Node) and self._dropped.get(node, False)

    def any_dropped(self, node: fx.Node) -> bool:
        """Whether any operand of `node` was lowered."""
        return any(self.is_dropped(source) for source in node.all_input_nodes)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for the operator that `node` calls."""
    name = operator_of(node)
    if is_elementwise(node):
        return _elementwise
    if name in LAST_DIM:
        return _last_dim
    return _RULES.get(name)


def _with_args(node: fx.Node, ops: Operands, changes: dict[str, Any], dropped: bool = True) -> Call:
    """The same call on lowered operands, with arguments in `changes` (already lowered) replaced."""
    schema = _names(node)
    args = [ops.new(arg) for arg in node.args]
    kwargs = {key: ops.new(arg) for key, arg in node.kwargs.items()}
    for name, value in changes.items():
        index = schema.index(name)
        if index < len(args):
            args[index] = value
        else:
            kwargs[name] = value
    return Call(node.target, tuple(args), kwargs, dropped)


def _elementwise(node: fx.Node, ops: Operands) -> Outcome:
    """Broadcasting aligns from the right: a leading 1 may be left out of any operand, as long as the
    result's own shape stays, or loses its leading 1 too."""
    rank = rank_of(node)
    full = [source for source in node.all_input_nodes if is_tensor(source) and rank_of(source) == rank]
    kept = [source for source in full if not ops.is_dropped(source)]
    if any(not is_tensor(source) and ops.is_dropped(source) for source in node.all_input_nodes):
        return None
    if not kept:
        return _with_args(node, ops, {})
    if any(not is_one(shape_of(source)[0]) for source in kept):
        return _with_args(node, ops, {}, dropped=False)
    return None


def _last_dim(node: fx.Node, ops: Operands) -> Outcome:
    others = [source for source in node.all_input_nodes[1:] if ops.is_dropped(source)]
    return None if others else _with_args(node, ops, {})


def _layer_norm(node: fx.Node, ops: Operands) -> Outcome:
    return _last_dim(node, ops) if len(argument(node, "normalized_shape")) < rank_of(_first(node)) else None


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _names(node: fx.Node) -> list[str]:
    assert isinstance(node.target, OpOverload)
    return argument_names(node.target)


def _one_dim(node: fx.Node, ops: Operands) -> Outcome:
    """`dim` names one dimension of the first operand; every tensor operand has the batch dimension."""
    dim = argument(node, "dim")
    if not isinstance(dim, int):
        return None
    if any(is_tensor(source) and not ops.is_dropped(source) for source in node.all_input_nodes):
        return None
    index = at(dim, rank_of(_first(node)))
    return _with_args(node, ops, {"dim": index - 1}) if index else None


def _index_select(node: fx.Node, ops: Operands) -> Outcome:
    index = at(argument(node, "dim"), rank_of(_first(node)))
    if not index or ops.is_dropped(argument(node, "index")):
        return None
    return _with_args(node, ops, {"dim": index - 1})


def _reduction(node: fx.Node, ops: Operands) -> Outcome:
    dims = argument(node, "dim") if "dim" in _names(node) else None
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    rank = rank_of(_first(node))
    places = [at(dim, rank) for dim in dims]
    if 0 in places or (rank_of(node) == 1 and not argument(node, "keepdim")):
        return None
    lowered = [place - 1 for place in places]
    return _with_args(node, ops, {"dim": lowered[0] if isinstance(argument(node, "dim"), int) else lowered})


def _joined(node: fx.Node, ops: Operands) -> Outcome:
    """cat and stack: all operands lowered, and another dimension joined."""
    tensors: list[fx.Node] = list(argument(node, "tensors"))
    index = at(argument(node, "dim"), rank_of(node))
    if not index or not all(ops.is_dropped(source) for source in tensors):
        return None
    return _with_args(node, ops, {"dim": index - 1})


def _reshaped(node: fx.Node, ops: Operands) -> Outcome:
    key = "size" if operator_of(node) == "view" else "shape"
    if rank_of(node) > 1 and is_one(shape_of(node)[0]):
        return _with_args(node, ops, {key: ops.new(list(argument(node, key))[1:])})
    return _with_args(node, ops, {}, dropped=False)


def _flatten(node: fx.Node, ops: Operands) -> Outcome:
    rank = rank_of(_first(node))
    start, end = at(argument(node, "start_dim"), rank), at(argument(node, "end_dim"), rank)
    if start == 0:
        return None
    return _with_args(node, ops, {"start_dim": start - 1, "end_dim": end - 1})


def _transpose(node: fx.Node, ops: Operands) -> Outcome:
    rank = rank_of(node)
    a, b = at(argument(node, "dim0"), rank), at(argument(node, "dim1"), rank)
    return _with_args(node, ops, {"dim0": a - 1, "dim1": b - 1}) if a and b else None


def _permute(node: fx.Node, ops: Operands) -> Outcome:
    order = [at(dim, rank_of(node)) for dim in argument(node, "dims")]
    if order[0] != 0:
        return None
    return _with_args(node, ops, {"dims": [dim - 1 for dim in order[1:]]})


def _unsqueeze(node: fx.Node, ops: Operands) -> Outcome:
    """A new dimension 0 takes the place of the one left out."""
    index = at(argument(node, "dim"), rank_of(node))
    return _with_args(node, ops, {"dim": max(index - 1, 0)})


def _squeeze(node: fx.Node, ops: Operands) -> Outcome:
    source = _first(node)
    dims = argument(node, "dim") if len(node.args) > 1 or "dim" in node.kwargs else None
    if dims is None:
        return _with_args(node, ops, {}, dropped=False)
    places = [at(dim, rank_of(source)) for dim in ([dims] if isinstance(dims, int) else dims)]
    rest = [place - 1 for place in places if place]
    gone = 0 in places
    if gone and rank_of(node) > 1 and is_one(shape_of(node)[0]):
        front = next(index for index in range(rank_of(source)) if index not in places)
        return Call(aten.squeeze.dims, (ops.new(source), [*rest, front - 1]))
    if not gone and rank_of(node) < 2:
        return None
    if not rest:
        return Same(ops.new(source), dropped=not gone)
    return Call(aten.squeeze.dims, (ops.new(source), rest), dropped=not gone)


def _select(node: fx.Node, ops: Operands) -> Outcome:
    source = _first(node)
    index = at(argument(node, "dim"), rank_of(source))
    if not index:
        return Same(ops.new(source), dropped=False)
    return _with_args(node, ops, {"dim": index - 1}) if rank_of(node) > 1 else None


def _slice(node: fx.Node, ops: Operands) -> Outcome:
    source = _first(node)
    index = at(argument(node, "dim"), rank_of(source))
    if index:
        return _with_args(node, ops, {"dim": index - 1})
    return Same(ops.new(source), dropped=True) if is_one(shape_of(node)[0]) else None


def _expand(node: fx.Node, ops: Operands) -> Outcome:
    sizes = list(argument(node, "size"))
    if rank_of(node) > 1 and is_one(shape_of(node)[0]):
        return _with_args(node, ops, {"size": ops.new(sizes[1:])})
    aligned = len(sizes) - rank_of(_first(node))
    if sizes[aligned] == -1:
        sizes[aligned] = 1
    return _with_args(node, ops, {"size": ops.new(sizes)}, dropped=False)


def _repeat(node: fx.Node, ops: Operands) -> Outcome:
    repeats = list(argument(node, "repeats"))
    if len(repeats) != rank_of(_first(node)) or repeats[0] != 1:
        return None
    return _with_args(node, ops, {"repeats": ops.new(repeats[1:])})


def _getitem(node: fx.Node, ops: Operands) -> Outcome:
    return Call(node.target, (ops.new(node.args[0]), node.args[1])) if is_tensor(node) else None


def _index(node: fx.Node, ops: Operands) -> Outcome:
    """`x[:, rows, …]`: index tensors past a leading full slice."""
    indices = list(argument(node, "indices"))
    if not indices or indices[0] is not None or any(ops.is_dropped(index) for index in indices):
        return None
    return _with_args(node, ops, {"indices": ops.new(indices[1:])})


def _matmul(node: fx.Node, ops: Operands) -> Outcome:
    a, b = node.all_input_nodes[0], node.all_input_nodes[-1]
    if rank_of(a) < 3 or not ops.is_dropped(a):
        return None
    if ops.is_dropped(b) != (rank_of(b) > 2) or rank_of(b) not in (2, rank_of(a)):
        return None
    return Call(aten.matmul.default, (ops.new(a), ops.new(b)))


def _bmm(node: fx.Node, ops: Operands) -> Outcome:
    a, b = argument(node, "self"), argument(node, "mat2")
    if not (ops.is_dropped(a) and ops.is_dropped(b)):
        return None
    return Call(aten.mm.default, (ops.new(a), ops.new(b)))


def _pad(node: fx.Node, ops: Operands) -> Outcome:
    return _with_args(node, ops, {}) if len(argument(node, "pad")) < 2 * rank_of(node) else None


def _sym_size(node: fx.Node, ops: Operands) -> Outcome:
    index = at(argument(node, "dim"), rank_of(_first(node)))
    return _with_args(node, ops, {"dim": index - 1}, dropped=False) if index else None


def _embedding(node: fx.Node, ops: Operands) -> Outcome:
    return None if ops.is_dropped(_first(node)) else _with_args(node, ops, {})


def _our_embedding(node: fx.Node, ops: Operands) -> Outcome:
    return _with_args(node, ops, {}) if ops.is_dropped(_first(node)) else None


def _complex(node: fx.Node, ops: Operands) -> Outcome:
    """The last dimension of two numbers becomes one complex number, or the reverse."""
    return _with_args(node, ops, {}) if rank_of(_first(node)) > 1 else None


def _one_hot(node: fx.Node, ops: Operands) -> Outcome:
    return _with_args(node, ops, {})


def _new_filled(node: fx.Node, ops: Operands) -> Outcome:
    """The operand gives dtype and device alone."""
    return _with_args(node, ops, {}, dropped=False)


_ALONG_ONE_DIM = """
    _softmax softmax cumsum topk sort argsort gather scatter scatter_add chunk split split_with_sizes
    unbind narrow repeat_interleave
"""
_REDUCTIONS = "sum mean amax amin any var std argmax max min logsumexp"
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ALONG_ONE_DIM.split(), _one_dim),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("view", "reshape"), _reshaped),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full"), _new_filled),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    "bmm": _bmm,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "expand": _expand,
    "flatten": _flatten,
    "getitem": _getitem,
    "index": _index,
    "index_select": _index_select,
    "layer_norm": _layer_norm,
    "linear": _last_dim,
    "llmc.embedding": _our_embedding,
    "matmul": _matmul,
    "one_hot": _one_hot,
    "permute": _permute,
    "repeat": _repeat,
    "rms_norm": _layer_norm,
    "select": _select,
    "slice": _slice,
    "squeeze": _squeeze,
    "sym_size": _sym_size,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
}
