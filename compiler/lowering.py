"""From an exported program to a graph over the listed vocabulary: weights by name, nothing nested, nothing
left over. Knows ATen and torch.export's signature; knows no model."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ..ir.program import TRACE_INPUTS
from ..ir.vocabulary import is_listed
from ..ir.weights import Constant, Expr, Unbound, WeightStore
from ..spec.errors import InternalError, ModelError
from .functional import functionalise, join_slices, writes
from .hf.ragged import MODEL_PREFIX

_aten = torch.ops.aten
# The same values under another name or in other strides, at least in evaluation.
_SAME_VALUES = frozenset(
    {"alias", "detach", "lift_fresh", "lift_fresh_copy", "clone", "contiguous", "dropout", "feature_dropout"}
)
_SPELLINGS = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "absolute": "abs", "clip": "clamp",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
_CASTS = frozenset({"to", "_to_copy", "type_as"})
# Operators that read memory as another type, so that strides matter to them.
_REINTERPRETING = frozenset({_aten.view_as_complex.default, _aten.view.dtype})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """A graph and the weights it reads."""

    graph: fx.Graph
    weights: WeightStore


def lower(exported: ExportedProgram, ties: Mapping[str, str]) -> Lowered:
    """The graph of `exported` with weights as `get_attr` nodes. `ties` maps each alias to its owner.

    Raises ModelError when the model writes to its own buffers, InternalError for an operator that the
    vocabulary lacks.
    """
    graph = exported.graph
    if any(writes(node) for node in graph.nodes):
        graph = functionalise(graph)
        if graph is None:  # torch.export can replace any write, at the price of tracing once more
            exported = exported.run_decompositions({})
            _refuse_mutation(exported)
            graph = exported.graph
    join_slices(graph)
    copier = _Copier(exported=exported, source=graph, ties=ties)
    for node in _live(graph):
        copier.copy(node)
    store = WeightStore(copier.entries, dict(ties)).restricted_to(copier.entries)
    return Lowered(graph=copier.graph, weights=store)


def _refuse_mutation(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        names = ", ".join(name.removeprefix(MODEL_PREFIX) for name in mutated)
        raise ModelError(
            "model.mutated_buffer",
            f"The model writes to {names} while it runs.",
            "State that changes from step to step would make a token depend on other requests.",
            "Choose a model family that `llmc models` lists as supported.",
        )


@dataclass(slots=True, kw_only=True)
class _Copier:
    """Copies nodes one by one into a new graph, renaming inputs and leaving out what changes nothing."""

    exported: ExportedProgram
    source: fx.Graph
    ties: Mapping[str, str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    entries: dict[str, Expr] = field(default_factory=dict[str, Expr])
    values: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    sources: dict[fx.Node, InputSpec] = field(default_factory=dict[fx.Node, InputSpec])
    readers: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])

    def __post_init__(self) -> None:
        specs = {_argument_name(spec): spec for spec in self.exported.graph_signature.input_specs}
        names = iter(entry.name for entry in TRACE_INPUTS)
        for node in self.source.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                new = self.graph.placeholder(next(names))
                new.meta["val"] = node.meta["val"]
                self.values[node] = new
            else:
                self.sources[node] = spec

    def copy(self, node: fx.Node) -> None:
        """Bring `node` over; operands must have come before it."""
        if node.op == "placeholder":
            return
        if node.op == "output":
            (result,) = fx.map_arg(node.args[0], self._value)  # pyright: ignore[reportGeneralTypeIssues]
            self.graph.output(result)
        elif node.op == "call_function":
            self.values[node] = self._call(node)
        else:
            raise _foreign(f"{node.op} {node.target}")

    def _value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self._weight(node)

    def _weight(self, node: fx.Node) -> fx.Node:
        """The one reader of the weight behind a lifted placeholder, made at its first use."""
        spec = self.sources[node]
        name = _weight_name(spec, self.ties)
        if name not in self.readers:
            reader = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            reader.meta["val"] = node.meta["val"]
            self.readers[name] = reader
            self.entries[name] = self._expression(spec, name, node.meta["val"])
        return self.readers[name]

    def _expression(self, spec: InputSpec, name: str, example: Tensor) -> Expr:
        target = str(spec.target)
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            return Unbound(name, tuple(example.shape), example.dtype)
        held: Any = {**self.exported.constants, **self.exported.state_dict}[target]
        return Constant(held.detach())

    def _call(self, node: fx.Node) -> Any:
        name = _name(node.target)
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and _changes_nothing(node, name, first):
            return self._value(first)
        if node.target is operator.getitem and _name(cast(fx.Node, first).target) == "broadcast_tensors":
            return self._broadcast(node, cast(fx.Node, first))
        if name == "broadcast_tensors":
            return None  # its results are made one by one, where they are taken
        target = _common_spelling(node.target, name)
        if not is_listed(target):
            raise _foreign(str(target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)  # pyright: ignore[reportGeneralTypeIssues]
        new = self.graph.create_node("call_function", target, args, _on_host(kwargs), name=node.name)  # pyright: ignore[reportArgumentType]
        new.meta["val"] = node.meta["val"]
        stack = node.meta.get("nn_module_stack")
        if stack:
            new.meta["module"] = str(next(reversed(stack.values()))[0]).removeprefix(MODEL_PREFIX)
        return new

    def _broadcast(self, item: fx.Node, broadcast: fx.Node) -> Any:
        source = cast(fx.Node, cast(Any, broadcast.args[0])[item.args[1]])
        shape = item.meta["val"].shape
        if source.meta["val"].shape == shape:
            return self._value(source)
        if not all(isinstance(size, int) for size in shape):
            raise _foreign("aten.broadcast_tensors over a symbolic size")
        new = self.graph.call_function(_aten.expand.default, (self._value(source), list(shape)))
        new.meta["val"] = item.meta["val"]
        return new


def _argument_name(spec: InputSpec) -> str:
    assert isinstance(spec.arg, TensorArgument)
    return spec.arg.name


def _weight_name(spec: InputSpec, ties: Mapping[str, str]) -> str:
    name = str(spec.target).removeprefix(MODEL_PREFIX)
    return ties.get(name, name)


def _name(target: Any) -> str:
    return target.name().split("::")[1].split(".")[0] if isinstance(target, OpOverload) else ""


def _changes_nothing(node: fx.Node, name: str, first: fx.Node) -> bool:
    if name in _SAME_VALUES:
        return not any(user.target in _REINTERPRETING for user in node.users)
    before, after = first.meta["val"], node.meta["val"]
    return name in _CASTS and isinstance(before, Tensor) and before.dtype == after.dtype


def _common_spelling(target: Any, name: str) -> Any:
    """One operator for each of those that ATen spells in several ways; views become reshapes, since strides
    change on the way."""
    if name in ("view", "_unsafe_view") and target is not _aten.view.dtype:
        return _aten.reshape.default
    if name not in _SPELLINGS:
        return target
    return getattr(getattr(_aten, _SPELLINGS[name]), str(target).rsplit(".", 1)[1])


def _on_host(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that name no device but the host's, and no memory form."""
    kept = {key: arg for key, arg in kwargs.items() if key not in ("pin_memory", "layout", "memory_format")}
    return {key: torch.device("cpu") if isinstance(arg, torch.device) else arg for key, arg in kept.items()}


def _live(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the result depends on, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes, (node,))
    return [node for node in graph.nodes if node in needed]


def _foreign(what: str) -> InternalError:
    return InternalError(
        "trace.operator",
        f"The traced model uses {what}.",
        "The vocabulary of programs has no such operator.",
        "Report the model; its family needs this operator in the vocabulary.",
    )
