"""The CPU backend: weights in the forms the step reads, one translation unit, a library per ISA level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ...artifact.cpu import (
    CPU_SOURCE,
    CPU_UNIT,
    CpuLevel,
    CpuUnit,
    decode_unit,
    encode_unit,
    library_path,
)
from ...artifact.reader import Artifact
from ...artifact.writer import ArtifactWriter
from ...ir.program import Program
from ...ir.weights import Expr, WeightStore
from ...kernels.levels import LEVELS, Level
from ...spec.target import Target
from ..base import RecallBytes, compute_bytes
from ..programs import WeightProgress, shared_weights, stored_sources, write_programs, write_weights
from .packed import unpacked
from .source import ABI_VERSION, MAX_THREADS, Source, generate
from .toolchain import compile_flags, compile_library, find_compiler, header_digest

# Libraries, programs, the source and small weights in their plain form.
_BESIDE_WEIGHTS_BYTES = 32 * 2**20
# One step's bounds, fixed when the code is generated: what the arena is sized for.
MAX_TOKENS = 512
MAX_LOGIT_ROWS = 64


class Backend:
    """`codegen.base.Backend` of target kind `cpu`, which has no variants."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Bytes of all weights as stored (small ones twice at most), and a bound for the rest.

        Raises TargetError when a node has no form here, or there is no C++ compiler.
        """
        find_compiler()
        return self.stored_form(program, portable).total_bytes + _BESIDE_WEIGHTS_BYTES

    def stored_form(self, program: Program, portable: Program) -> WeightStore:
        """The weights of both programs, in the layouts that the step's kernels read."""
        source = generate(program, max_tokens=MAX_TOKENS, max_logit_rows=MAX_LOGIT_ROWS)
        return cpu_weights(shared_weights(program, portable), source)

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
        cache: RecallBytes = compute_bytes,
    ) -> None:
        """Write programs, generated code, libraries and weights.

        Raises TargetError when a node has no form here, or the C++ compiler is missing or refuses.
        """
        compiler = find_compiler()
        source = generate(program, max_tokens=MAX_TOKENS, max_logit_rows=MAX_LOGIT_ROWS)
        levels = LEVELS  # the slowest takes longest to compile, and goes first
        headers = header_digest()

        def compile_level(level: Level) -> bytes:
            inputs = (compiler.path, compiler.version, compile_flags(level), headers, source.text)
            label = f"{level.name} library of {program.spec.architecture}"
            return cache(inputs, label, lambda: compile_library(compiler, source.text, level))

        with ThreadPoolExecutor(max_workers=2) as pool:
            libraries = list(pool.map(compile_level, levels))
        write_programs(program, portable, writer)
        writer.write_bytes(CPU_SOURCE, "kernel", source.text.encode())
        for level, library in zip(levels, libraries, strict=True):
            writer.write_bytes(library_path(level.name), "kernel", library)
        weights = cpu_weights(shared_weights(program, portable), source)
        writer.write_bytes(CPU_UNIT, "kernel", encode_unit(_unit(source, compiler.version)))
        write_weights(weights, writer, progress=progress)

    def stored_weights(self, artifact: Artifact) -> Mapping[str, Expr]:
        """The tensors of the files, packed ones unpacked as they are asked for."""
        stored = stored_sources(artifact)
        unit = decode_unit(artifact.read_bytes(CPU_UNIT))
        for packed in unit.packed:
            stored |= unpacked(packed, stored[packed.stored])
        return stored


def _unit(source: Source, compiler: str) -> CpuUnit:
    return CpuUnit(
        abi_version=ABI_VERSION,
        max_tokens=source.max_tokens,
        max_logit_rows=source.max_logit_rows,
        max_threads=MAX_THREADS,
        arena_bytes=source.arena_bytes,
        weights=tuple(slot.stored_name for slot in source.weight_slots),
        packed=tuple(slot.packed for slot in source.weight_slots if slot.packed is not None),
        levels=tuple(
            CpuLevel(name=level.name, features=tuple(sorted(level.features))) for level in LEVELS[::-1]
        ),
        compiler=compiler,
    )


def cpu_weights(shared: WeightStore, source: Source) -> WeightStore:
    """The weights to store: what the step reads, and of the programs' own what no packed form holds."""
    replaced = {name for slot in source.weight_slots if slot.packed for name in slot.packed.names}
    kept: dict[str, Expr] = {name: shared[name] for name in shared if name not in replaced}
    kept |= {slot.stored_name: slot.expression(shared) for slot in source.weight_slots}
    return WeightStore(kept, shared.ties, shared.reader)
