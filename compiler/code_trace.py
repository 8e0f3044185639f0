"""What the generated code of a CPU artifact computes at every node, against the program it was generated
from."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.cpu import CPU_SOURCE, CPU_UNIT, CpuUnit, decode_unit, library_path
from ..artifact.reader import Artifact
from ..codegen.cpu.taps import SET_TAPS, TappedSource, tap_source
from ..codegen.cpu.toolchain import compile_library, find_compiler
from ..ir.infer import infer
from ..ir.program import Program
from ..kernels.levels import LEVELS
from ..runtime.executors.cpu import choose_level, processor_features
from ..runtime.executors.cpu_model import CpuModel
from ..runtime.executors.tiles import SequencePart
from .code_lines import CodeTrace, code_lines
from .node_values import NodeRun

_OTHER_KERNELS = (
    "The library in the artifact gives other bits: it was built from other kernels than this llmc's, so "
    "compile the model again before looking further."
)


def trace_code(
    artifact: Artifact, program: Program, expected: NodeRun, prompts: Sequence[tuple[int, ...]]
) -> CodeTrace:
    """Build the artifact's code once more with taps and run it on `prompts`; `expected` is what `program`,
    the artifact's final one, computes on them.

    Raises TargetError without a C++ compiler, ArtifactError for code of another version of llmc.
    """
    infer(program)
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    level = choose_level(unit, processor_features())
    source = tap_source(program, artifact.read_bytes(CPU_SOURCE).decode())
    with tempfile.TemporaryDirectory(prefix="llmc-trace-") as folder:
        library = Path(folder) / "traced.so"
        chosen = next(each for each in LEVELS if each.name == level)
        library.write_bytes(compile_library(find_compiler(), source.text, chosen))
        found = _run(artifact, unit, library, source, prompts)
    shipped = _run(artifact, unit, artifact.path / library_path(level), None, prompts)
    is_same = torch.equal(found.logits, shipped.logits)
    return CodeTrace(
        code=f"The code for {level}",
        part="statement",
        file=CPU_SOURCE,
        lines=code_lines(program, expected, found.rows, {tap.node: tap.call for tap in source.taps}),
        same_as_shipped=is_same,
        difference="" if is_same else _OTHER_KERNELS,
    )


def _run(
    artifact: Artifact,
    unit: CpuUnit,
    library: Path,
    source: TappedSource | None,
    prompts: Sequence[tuple[int, ...]],
) -> NodeRun:
    """One thread, a prompt after the other, in steps whose every token's logits are wanted."""
    layout, spec = artifact.manifest.cache, artifact.manifest.spec
    most = max(map(len, prompts))
    pages = tuple(group.pages_for(most) + 1 for group in layout.groups)
    stored = artifact.weights()
    weights = [stored[name].data for name in unit.weights]
    model = CpuModel(library, unit, weights, layout, pages, spec.vocab_size, 1)
    size = min(unit.max_tokens, unit.max_logit_rows)
    buffers: list[NDArray[np.float32]] = []
    if source is not None:
        buffers = [np.zeros((size, tap.width), dtype=np.float32) for tap in source.taps]
        _set_taps(library, buffers)
    tables = [list(range(count)) for count in pages]
    logits: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in buffers]
    try:
        for prompt in prompts:
            for start in range(0, len(prompt), size):
                ids = prompt[start : start + size]
                part = SequencePart(start=start, token_ids=ids, block_tables=tables, wanted=range(len(ids)))
                logits += [torch.from_numpy(tile.logits.copy()) for tile in model.run([part])]
                for rows, buffer in zip(kept, buffers, strict=True):
                    rows.append(torch.from_numpy(buffer[: len(ids)].copy()))
    finally:
        model.close()
    names = [tap.node for tap in source.taps] if source is not None else []
    joined = {name: torch.cat(rows) for name, rows in zip(names, kept, strict=True)}
    return NodeRun(rows=joined, logits=torch.cat(logits))


def _set_taps(library: Path, buffers: Sequence[NDArray[np.float32]]) -> None:
    """The library is open already: opening it again gives the same one, with the same memory."""
    addresses = (ctypes.c_void_p * max(1, len(buffers)))(*(buffer.ctypes.data for buffer in buffers))
    setter = getattr(ctypes.CDLL(str(library)), SET_TAPS)
    setter.restype = None
    setter(addresses)
