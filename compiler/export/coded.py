"""The quantised weights of a program: which operators read them, in what scheme, with what inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.arguments import argument
from ...ir.program import Program
from ...ir.quantized import QTensor

_LINEAR = torch.ops.llmc.quantized_linear.default
_EMBEDDING = torch.ops.llmc.quantized_embedding.default
_MOE = torch.ops.llmc.quantized_moe.default


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """Codes by the names of their parts. `inputs` is the scheme of the product's input and `input_scale` the
    name of its stored scale; `is_table` says whether rows are looked up in it."""

    name: str
    scheme: str
    codes: str
    scales: str
    zeros: str | None
    inputs: str = ""
    input_scale: str | None = None
    is_table: bool = False

    @property
    def parts(self) -> frozenset[str]:
        """The names of all weights of the program that belong to it."""
        parts = (self.codes, self.scales, self.zeros, self.input_scale)
        return frozenset(part for part in parts if part is not None)

    def read(self, program: Program) -> QTensor:
        """Its tensors."""
        weights = program.weights
        zeros = None if self.zeros is None else weights.evaluate(self.zeros)
        return QTensor(weights.evaluate(self.codes), weights.evaluate(self.scales), zeros)


def coded_weights(program: Program) -> dict[str, CodedWeight]:
    """Every quantised weight by name. One that is both looked up and multiplied with counts as a table."""
    found: dict[str, CodedWeight] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _LINEAR:
            made = [_read_by(node, "", inputs=str(argument(node, "activation")))]
        elif node.target is _EMBEDDING:
            made = [_read_by(node, "", is_table=True)]
        elif node.target is _MOE:
            inputs = str(argument(node, "activation_scheme"))
            made = [_read_by(node, prefix, inputs=inputs) for prefix in ("gate_up_", "down_")]
        else:
            continue
        for weight in made:
            if weight.name not in found or weight.is_table:
                found[weight.name] = weight
    return found


def _read_by(node: fx.Node, prefix: str, *, inputs: str = "", is_table: bool = False) -> CodedWeight:
    scale = argument(node, "activation_scale") if node.target is _LINEAR else None
    codes = _name(argument(node, prefix + "codes"))
    assert codes is not None
    scales = _name(argument(node, prefix + "scales"))
    assert scales is not None
    return CodedWeight(
        name=codes.removesuffix(".codes"),
        scheme=str(argument(node, prefix + "scheme")),
        codes=codes,
        scales=scales,
        zeros=_name(argument(node, prefix + "zeros")),
        inputs=inputs,
        input_scale=_name(scale),
        is_table=is_table,
    )


def _name(node: fx.Node | None) -> str | None:
    return None if node is None else str(node.target)
