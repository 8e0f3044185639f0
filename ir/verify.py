"""The rules that every Program obeys between passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..spec.errors import InternalError
from .program import Program
from .vocabulary import is_listed

_ATTENTION = ("llmc::attention", "llmc::paged_attention")


def verify(program: Program) -> None:
    """Check `program` against its rules. Raises InternalError listing every violation, the first in `why`.

    Rules: placeholders match `inputs`; only listed operators; every weight is in the store, read by
    one node, and each node's value is known; T stays symbolic; one attention per layer of the spec;
    one output of shape [L, vocab].
    """
    problems = [
        *_check_inputs(program),
        *_check_nodes(program),
        *_check_attention(program),
        *_check_output(program),
    ]
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InternalError(
            "ir.invalid",
            "The program breaks a rule of the intermediate representation.",
            f"{problems[0]}{rest}.",
            "This is a defect of the last pass that ran; report it with --dump-ir output.",
        )


def _check_inputs(program: Program) -> list[str]:
    found = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    declared = [entry.name for entry in program.inputs]
    problems = [] if found == declared else [f"placeholders {found} are not the inputs {declared}"]
    for node in program.graph.nodes:
        entry = next((item for item in program.inputs if item.name == node.target), None)
        value = node.meta.get("val")
        if node.op != "placeholder" or entry is None or not isinstance(value, torch.Tensor):
            continue
        for dim, name in zip(value.shape, entry.shape, strict=True):
            if isinstance(name, str) and not isinstance(dim, torch.SymInt):
                problems.append(f"dimension {name} of input {entry.name!r} was specialised to {dim}")
    return problems


def _check_nodes(program: Program) -> list[str]:
    problems: list[str] = []
    readers: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_method"):
            problems.append(f"node {node.name!r} is a {node.op}")
        if node.op == "call_function" and not is_listed(node.target):
            problems.append(f"node {node.name!r} calls {node.target}, which is not in the vocabulary")
        if node.op == "get_attr":
            readers[str(node.target)] += 1
            if node.target not in program.weights:
                problems.append(f"weight {node.target!r} is not in the store")
            else:
                problems.extend(_weight_mismatch(program, node))
        if node.op != "output" and "val" not in node.meta:
            problems.append(f"node {node.name!r} has no inferred value")
    problems.extend(
        f"weight {name!r} is read by {count} nodes" for name, count in readers.items() if count > 1
    )
    return problems


def _weight_mismatch(program: Program, node: fx.Node) -> list[str]:
    expr, value = program.weights[str(node.target)], node.meta.get("val")
    if isinstance(value, torch.Tensor) and (tuple(value.shape), value.dtype) != (expr.shape, expr.dtype):
        return [f"weight {node.target!r} is {expr.dtype}{list(expr.shape)} but its node says {value.shape}"]
    return []


def _check_attention(program: Program) -> list[str]:
    calls = [node for node in program.graph.nodes if _schema_name(node.target) in _ATTENTION]
    expected = len(program.spec.attention)
    if len(calls) != expected:
        return [f"{len(calls)} attention nodes for {expected} attention layers"]
    return []


def _check_output(program: Program) -> list[str]:
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], fx.Node):
        return ["the graph must return exactly one value"]
    value = outputs[0].args[0].meta.get("val")
    if isinstance(value, torch.Tensor) and (value.dim() != 2 or value.shape[1] != program.spec.vocab_size):
        return [f"the output has shape {list(value.shape)}, not [L, {program.spec.vocab_size}]"]
    return []


def _schema_name(target: Any) -> str:
    return target.name().split(".")[0] if isinstance(target, OpOverload) else ""
