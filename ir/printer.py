"""Programs as readable text: one line a node, shapes with symbol names."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .program import GraphInput, Program
from .vocabulary import operator_name

_SHORT = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "bool", "complex64": "c64", "float8_e4m3fn": "e4m3",
}  # fmt: skip


def print_program(program: Program) -> str:
    """The whole program: a header, inputs, then `name: type = operator(arguments)` per node."""
    symbols = symbol_names(program.graph, program.inputs)
    spec = program.spec
    sizes = f"layers={spec.num_layers} hidden={spec.hidden_size} vocab={spec.vocab_size}"
    lines = [
        f"program {spec.family} {sizes} dtype={spec.compute_dtype}",
        f"facts: {', '.join(sorted(program.facts)) or '-'}",
    ]
    for node in program.graph.nodes:
        lines.append("  " + print_node(node, symbols))
    return "\n".join(lines) + "\n"


def print_node(node: fx.Node, symbols: dict[str, str]) -> str:
    """One node on one line."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    kind = type_text(node.meta.get("val"), symbols)
    if node.op == "placeholder":
        return f"{node.name}: {kind} = input"
    if node.op == "get_attr":
        return f"{node.name}: {kind} = weight {node.target}"
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{key}={_argument(arg)}" for key, arg in node.kwargs.items()]
    return f"{node.name}: {kind} = {operator_name(node.target)}({', '.join(arguments)})"


def type_text(value: Any, symbols: dict[str, str]) -> str:
    """`bf16[T, 64]` for a tensor, `int` for a size, a tuple of these for several results."""
    if isinstance(value, torch.Tensor):
        dims = ", ".join(dim_text(dim, symbols) for dim in value.shape)
        name = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT.get(name, name)}[{dims}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(item, symbols) for item in value)})"
    return "?" if value is None else dim_text(value, symbols)


def dim_text(dim: Any, symbols: dict[str, str]) -> str:
    """A size as a number, or as an expression over symbol names."""
    text = str(dim)
    for internal, name in symbols.items():
        text = text.replace(internal, name)
    return text


def symbol_names(graph: fx.Graph, inputs: tuple[GraphInput, ...]) -> dict[str, str]:
    """Internal symbol -> name of the input dimension it stands for, longest internal name first."""
    names: dict[str, str] = {}
    declared = {entry.name: entry for entry in inputs}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, FakeTensor):
            continue
        for dim, name in zip(value.shape, declared[str(node.target)].shape, strict=True):
            if isinstance(name, str):
                names.setdefault(str(dim), name)
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))


def _argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_argument(item) for item in arg)}]"
    if isinstance(arg, torch.dtype):
        return str(arg).removeprefix("torch.")
    return repr(arg)
