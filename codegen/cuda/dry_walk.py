"""Which kernels a program needs: one walk over fake tensors for each class of step. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ...ir.interpret import interpret
from ...ir.program import Program
from ...kernels.cuda.launch import Launch, Specialisation
from ...kernels.cuda.operators import CudaOperators
from ...kernels.cuda.substitution import substitute

# Rows of a product fall into these classes (see `kernels.cuda.operators`).
ROW_CLASSES = (16, 32, 64, 128)


@dataclass(slots=True)
class Recorder:
    """A launcher that carries nothing out and keeps what would be needed, each once, in order."""

    found: dict[str, Specialisation] = field(default_factory=dict[str, Specialisation])

    def __call__(self, launch: Launch) -> None:
        self.found.setdefault(launch.specialisation.key, launch.specialisation)


def needed_kernels(program: Program, weights: Mapping[str, Any]) -> list[Specialisation]:
    """Every specialisation that any step of a final `program` may launch.

    `weights` gives shape and dtype of each stored weight by the name that the program reads.
    """
    recorder = Recorder()
    graph = substitute(program.graph, CudaOperators(recorder))
    for rows in ROW_CLASSES:
        for sequences in (rows, 1):
            _walk(program, graph, weights, {"T": rows, "S": sequences, "Q": sequences + 1, "L": rows})
    return list(recorder.found.values())


def _walk(program: Program, graph: fx.Graph, weights: Mapping[str, Any], sizes: dict[str, int]) -> None:
    with FakeTensorMode():

        def fake(shape: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
            known = [size if isinstance(size, int) else sizes.get(size, 1) for size in shape]
            return torch.empty(known, dtype=dtype)

        inputs = {each.name: fake(each.shape, getattr(torch, each.dtype)) for each in program.inputs}
        weight: Callable[[str], Tensor] = lambda name: fake(tuple(weights[name].shape), weights[name].dtype)  # noqa: E731
        interpret(graph, inputs, weight)
