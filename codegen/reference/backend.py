"""The reference backend: the program as data and its weights as they are. There is no code to generate;
the executor interprets the graph with the reference operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...artifact.reader import Artifact
from ...artifact.writer import ArtifactWriter
from ...ir.program import Program
from ...ir.weights import Expr, WeightStore
from ...spec.target import Target
from ..base import RecallBytes, compute_bytes
from ..programs import WeightProgress, shared_weights, stored_sources, write_programs, write_weights

# What programs, headers, tokenizer and manifest take beside the weights, generously.
_BESIDE_WEIGHTS_BYTES = 64 * 2**20


class Backend:
    """`codegen.base.Backend` of target kind `reference`, which has no variants."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Bytes of all weights as stored, and a bound for the rest."""
        return shared_weights(program, portable).total_bytes + _BESIDE_WEIGHTS_BYTES

    def stored_form(self, program: Program, portable: Program) -> WeightStore:
        """The weights of both programs as they are."""
        return shared_weights(program, portable)

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
        cache: RecallBytes = compute_bytes,
    ) -> None:
        """Writes programs and weights."""
        write_programs(program, portable, writer)
        write_weights(shared_weights(program, portable), writer, progress=progress)

    def stored_weights(self, artifact: Artifact) -> Mapping[str, Expr]:
        """The tensors of the files."""
        return stored_sources(artifact)
