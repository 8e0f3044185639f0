"""A program of lower precision, computed in float32. Knows where a graph names a dtype, and no operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from .infer import infer
from .program import Program
from .weights import Cast

# As a graph names them: operators of ours take a dtype's name.
_LOW = ("bfloat16", "float16", torch.bfloat16, torch.float16)


def widened(program: Program) -> Program:
    """`program` with every value that it computes in float16 or bfloat16 in float32.

    Weights keep their values, codes their meaning, caches their dtypes: what is left out is rounding.
    """
    graph = program.copy_graph()
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _raised)
        node.meta.pop("val", None)
    entries = {
        name: Cast(expr, torch.float32) if expr.dtype in _LOW else expr
        for name, expr in program.weights.entries.items()
    }
    done = program.replace(
        graph=graph,
        weights=program.weights.with_entries(entries),
        spec=replace(program.spec, compute_dtype="float32"),
    )
    infer(done)
    return done


def _raised(argument: Any) -> Any:
    if isinstance(argument, fx.Node) or argument not in _LOW:
        return argument
    return "float32" if isinstance(argument, str) else torch.float32
