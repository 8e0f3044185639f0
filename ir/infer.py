"""Shapes and dtypes by running each operator on fake tensors, with symbolic step dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..spec.errors import InternalError
from .program import GraphInput, Program

# Example sizes behind the symbols: distinct primes, so that two symbols are never taken for one.
_HINTS = {"T": 13, "L": 5, "S": 3}
_PRIMES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79)


def infer(program: Program) -> None:
    """Give every node without `meta["val"]` its fake value, in place.

    A pass that inserts nodes leaves their meta empty; values already known are kept. Raises
    InternalError naming the node when an operator refuses its inputs.
    """
    mode = _mode_of(program.graph) or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = {entry.name: entry for entry in program.inputs}
    hints = symbol_hints(program.inputs)
    for node in program.graph.nodes:
        if "val" in node.meta or node.op == "output":
            continue
        if node.op == "placeholder":
            node.meta["val"] = _fake_input(inputs[node.target], hints, mode)
        elif node.op == "get_attr":
            expr = program.weights[str(node.target)]
            with mode:
                node.meta["val"] = torch.empty(expr.shape, dtype=expr.dtype)
        else:
            node.meta["val"] = _evaluate(node, mode)


def _evaluate(node: fx.Node, mode: FakeTensorMode) -> Any:
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    assert callable(node.target)
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)
    except Exception as error:
        raise InternalError(
            "ir.infer",
            f"Node {node.name!r} ({node.target}) does not accept its inputs.",
            f"Shape inference failed: {error}.",
            "This is a defect of the pass that made the node; report it with --dump-ir output.",
        ) from error


def symbol_hints(inputs: tuple[GraphInput, ...]) -> dict[str, int]:
    """An example size for every symbol of `inputs`, no two alike."""
    names = dict.fromkeys(dim for entry in inputs for dim in entry.shape if isinstance(dim, str))
    others = [name for name in names if name not in _HINTS]
    primes: list[int] = list(_PRIMES)
    while len(primes) < len(others):
        candidate = primes[-1] + 2
        while any(candidate % prime == 0 for prime in (2, 3, 5, 7, 11, 13, *primes)):
            candidate += 2
        primes.append(candidate)
    return _HINTS | dict(zip(others, primes, strict=False))


def _fake_input(entry: GraphInput, hints: dict[str, int], mode: FakeTensorMode) -> FakeTensor:
    sizes = [dim if isinstance(dim, int) else hints[dim] for dim in entry.shape]
    dynamic = [DimDynamic.STATIC if isinstance(dim, int) else DimDynamic.DUCK for dim in entry.shape]
    real = torch.empty(sizes, dtype=getattr(torch, entry.dtype), device="meta")
    example = torch.empty(1, dtype=real.dtype).expand(sizes) if sizes else real
    context = StatelessSymbolicContext(dynamic_sizes=dynamic)
    fake = mode.from_tensor(example, symbolic_context=context)
    with mode:
        return torch.empty(fake.shape, dtype=real.dtype)  # pyright: ignore[reportReturnType]


def _mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None
