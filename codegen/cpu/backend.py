"""The CPU backend: weights in the forms the step reads, one translation unit, a library per ISA level."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from ...artifact.cpu import CPU_SOURCE, CPU_UNIT, CpuLevel, CpuUnit, encode_unit, library_path
from ...artifact.writer import ArtifactWriter
from ...ir.program import Program
from ...ir.weights import Cast, Expr, WeightStore
from ...kernels.levels import LEVELS
from ..programs import WeightProgress, shared_weights, write_programs, write_weights
from .source import ABI_VERSION, MAX_THREADS, Source, generate
from .toolchain import compile_library, find_compiler

_BESIDE_WEIGHTS_BYTES = 128 * 2**20
# One step's bounds, fixed when the code is generated: what the arena is sized for.
MAX_TOKENS = 512
MAX_LOGIT_ROWS = 64


class Backend:
    """`codegen.base.Backend` of target kind `cpu`."""

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Bytes of all weights as stored (small ones twice at most), and a bound for the rest."""
        find_compiler()
        return shared_weights(program, portable).total_bytes + _BESIDE_WEIGHTS_BYTES

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
    ) -> None:
        """Write programs, generated code, libraries and weights.

        Raises TargetError when a node has no form here, or the C++ compiler is missing or refuses.
        """
        compiler = find_compiler()
        source = generate(program, max_tokens=MAX_TOKENS, max_logit_rows=MAX_LOGIT_ROWS)
        levels = LEVELS[::-1]
        compile_level = partial(compile_library, compiler, source.text)
        with ThreadPoolExecutor(max_workers=2) as pool:
            libraries = list(pool.map(compile_level, levels))
        write_programs(program, portable, writer)
        writer.write_bytes(CPU_SOURCE, "kernel", source.text.encode())
        for level, library in zip(levels, libraries, strict=True):
            writer.write_bytes(library_path(level.name), "kernel", library)
        weights = cpu_weights(shared_weights(program, portable), source)
        writer.write_bytes(CPU_UNIT, "kernel", encode_unit(_unit(source, compiler.version)))
        write_weights(weights, writer, progress=progress)


def _unit(source: Source, compiler: str) -> CpuUnit:
    return CpuUnit(
        abi_version=ABI_VERSION,
        max_tokens=source.max_tokens,
        max_logit_rows=source.max_logit_rows,
        max_threads=MAX_THREADS,
        arena_bytes=source.arena_bytes,
        weights=tuple(slot_name(name, form) for name, form in source.weight_slots),
        levels=tuple(
            CpuLevel(name=level.name, features=tuple(sorted(level.features))) for level in LEVELS[::-1]
        ),
        compiler=compiler,
    )


def slot_name(name: str, form: str) -> str:
    """The stored tensor that serves weight `name` in `form`."""
    return name if form == "stored" else f"{name}@{form}"


def cpu_weights(shared: WeightStore, source: Source) -> WeightStore:
    """The weights to store: those of the programs, and those that the step reads in another form."""
    added: dict[str, Expr] = {}
    for name, form in source.weight_slots:
        if form == "plain":
            expr = shared[name]
            added[slot_name(name, form)] = Cast(expr, plain_dtype(expr.dtype))
    return shared.with_entries(added)


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which generic code reads a stored one: float32, int64 or one byte a bool."""
    if dtype.is_floating_point:
        return torch.float32
    return dtype if dtype == torch.bool else torch.int64
