"""Weights in the words that kernels read, and back, as lazy tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...artifact.cuda import WordWeight
from ...ir import ops
from ...ir.program import Program
from ...ir.weights import Expr, Reader
from ...kernels.cuda.packing import pack_words, unpack_words
from ...spec.quant import parse_scheme

assert ops  # importing it registers the operators
# Where operators have codes, and their schemes.
_READERS = {
    torch.ops.llmc.quantized_linear.default: ((1, 5),),
    torch.ops.llmc.quantized_embedding.default: ((1, 4),),
    torch.ops.llmc.quantized_moe.default: ((3, 15), (6, 16)),
}


@dataclass(frozen=True, slots=True)
class Words:
    """Portable codes, packed."""

    of: Expr
    dtype: torch.dtype = torch.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """16 words for a block of 128 codes, 64 bytes; experts' rows one after the other."""
        return (math.prod(self.of.shape[:-1]), 16 * -(-self.of.shape[-1] // 64))

    def evaluate(self, reader: Reader) -> Tensor:
        """Pack the codes."""
        return pack_words(self.of.evaluate(reader).flatten(0, -2))


@dataclass(frozen=True, slots=True)
class CodesOfWords:
    """Portable codes, from stored words."""

    words: Expr
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    def evaluate(self, reader: Reader) -> Tensor:
        """Unpack the words."""
        return unpack_words(self.words.evaluate(reader), self.shape[-1]).view(self.shape)


def word_weights(program: Program) -> tuple[WordWeight, ...]:
    """The codes of fewer than 8 bits that linears and tables of `program` read, each once, in order of
    use."""
    found: dict[str, WordWeight] = {}
    for node in program.graph.nodes:
        for places in _READERS.get(node.target, ()) if node.op == "call_function" else ():
            codes, scheme = (node.args[position] for position in places)
            assert isinstance(codes, fx.Node)
            name = str(codes.target)
            if parse_scheme(str(scheme)).bits < 8:
                *experts, rows, width = program.weights[name].shape
                count = experts[0] if experts else 0
                found[name] = WordWeight(
                    stored=f"{name}@words", codes=name, experts=count, rows=rows, width=width
                )
    return tuple(found.values())


def stored_weights(weights: dict[str, Expr], words: tuple[WordWeight, ...]) -> dict[str, Expr]:
    """What the artifact stores for `weights`, by stored name: words instead of the codes that they
    replace."""
    stored = dict(weights)
    for word in words:
        stored[word.stored] = Words(stored.pop(word.codes))
    return stored
