"""The CUDA backend: weights in the forms that kernels read, and every kernel a step may launch, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from ...artifact.cuda import (
    CUDA_UNIT,
    CudaKernel,
    CudaUnit,
    ProductVariant,
    WordWeight,
    decode_unit,
    encode_unit,
)
from ...artifact.reader import Artifact
from ...artifact.writer import ArtifactWriter
from ...ir.program import Program
from ...ir.weights import Expr, WeightStore
from ...kernels.cuda.launch import Specialisation
from ...kernels.cuda.variant_table import Choice, Choices, newest
from ...spec.target import Target
from ..base import RecallBytes, compute_bytes
from ..programs import WeightProgress, shared_weights, stored_sources, write_programs, write_weights
from .assemble import Machine, assemble, kernel_of, require_triton
from .dry_walk import Needs, needs_of
from .words import CodesOfWords, stored_weights, word_weights

# Programs, cubins, headers, tokenizer and manifest.
_BESIDE_WEIGHTS_BYTES = 64 * 2**20
# The architecture whose PTX every newer GPU's driver can compile.
_PORTABLE = "sm_80"


class Backend:
    """`codegen.base.Backend` of target kind `cuda`."""

    def __init__(self, target: Target) -> None:
        self._architectures = target.levels

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Bytes of all weights as stored, and a bound for the rest."""
        require_triton()
        return shared_weights(program, portable).total_bytes + _BESIDE_WEIGHTS_BYTES

    def stored_form(self, program: Program, portable: Program) -> WeightStore:
        """The weights of both programs, codes in words."""
        shared = shared_weights(program, portable)
        entries = stored_weights({name: shared[name] for name in shared}, word_weights(program))
        return WeightStore(entries, shared.ties, shared.reader)

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
        cache: RecallBytes = compute_bytes,
    ) -> None:
        """Write programs, kernels and weights.

        Raises TargetError when triton is missing or a matrix's scheme has no kernel.
        """
        shared = shared_weights(program, portable)
        words = word_weights(program)
        stored = stored_weights({name: shared[name] for name in shared}, words)
        read = stored | {word.codes: stored[word.stored] for word in words}
        choices = Choices(newest(self._architectures))
        needs = needs_of(program, read, choices)
        write_kernels(needs, self._architectures, words, writer, choices.taken, cache)
        write_programs(program, portable, writer)
        write_weights(WeightStore(stored, shared.ties, shared.reader), writer, progress=progress)

    def stored_weights(self, artifact: Artifact) -> Mapping[str, Expr]:
        """The tensors of the files, words unpacked as they are asked for."""
        stored = stored_sources(artifact)
        for word in decode_unit(artifact.read_bytes(CUDA_UNIT)).words:
            stored[word.codes] = CodesOfWords(stored[word.stored], word.shape)
        return stored


def write_kernels(
    needs: Needs,
    architectures: Sequence[str],
    words: tuple[WordWeight, ...],
    writer: ArtifactWriter,
    choices: Mapping[str, Choice],
    cache: RecallBytes = compute_bytes,
    tuned_on: str = "",
) -> CudaUnit:
    """Compile and write every kernel for every architecture, and what describes them; `choices` are the
    variants taken, by class of product."""
    wanted = [(each, name) for name in architectures for each in needs.kernels]
    kernels = [
        _write_kernel(each, name, machine, writer)
        for (each, name), machine in zip(wanted, assemble(wanted, cache), strict=True)
    ]
    unit = CudaUnit(
        triton=version("triton"),
        kernels=tuple(kernels),
        words=words,
        arenas=needs.arenas,
        variants=tuple(_variant(name, choices[name]) for name in sorted(choices)),
        tuned_on=tuned_on,
    )
    writer.write_bytes(CUDA_UNIT, "kernel", encode_unit(unit))
    return unit


def _variant(name: str, choice: Choice) -> ProductVariant:
    own = choice.variant
    return ProductVariant(
        product=name, columns=own.columns, warps=own.warps, stages=own.stages, reason=choice.reason
    )


def _write_kernel(
    specialisation: Specialisation, architecture: str, machine: Machine, writer: ArtifactWriter
) -> CudaKernel:
    stem = f"kernels/{specialisation.kernel}-{specialisation.key}"
    file, ptx = f"{stem}-{architecture}.cubin", f"{stem}.ptx" if architecture == _PORTABLE else ""
    writer.write_bytes(file, "kernel", machine.cubin)
    if ptx:
        writer.write_bytes(ptx, "kernel", machine.ptx)
    return kernel_of(specialisation, architecture, machine, file, ptx)
