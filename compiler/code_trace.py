"""What the generated code of a CPU artifact computes at every node, against the program it was generated
from: the first node at which it leaves the program names the kernel that is wrong."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..artifact.cpu import CPU_SOURCE, CPU_UNIT, CpuUnit, decode_unit, library_path
from ..artifact.reader import Artifact
from ..codegen.cpu.taps import SET_TAPS, Tap, TappedSource, tap_source
from ..codegen.cpu.toolchain import compile_library, find_compiler
from ..ir.infer import infer
from ..ir.program import Program
from ..ir.vocabulary import operator_name
from ..kernels.levels import LEVELS
from ..runtime.executors.cpu import choose_level, processor_features
from ..runtime.executors.cpu_model import CpuModel
from ..runtime.executors.tiles import SequencePart
from .node_values import NodeRun, layer_of, relative_error

# Code that rounds in other places than the program does is off by this much of a node at most, or by so many
# times as much as what the node is computed from.
_ROUNDING = 0.02
_GROWTH = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLine:
    """One node: the relative error of the code to the program, and what was allowed."""

    node: str
    operator: str
    layer: str
    call: str
    error: float
    allowed: float

    @property
    def exceeds(self) -> bool:
        """Whether the node's own code is to blame."""
        return not self.error <= self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeTrace:
    """The nodes in order, of the code for `level`. `same_as_shipped` says whether the library that the
    artifact holds gives the traced code's logits to the bit: they are of one source, and of the same kernels
    unless those have changed since."""

    level: str
    lines: tuple[CodeLine, ...]
    same_as_shipped: bool

    @property
    def first(self) -> CodeLine | None:
        """The first node whose code is to blame."""
        return next((line for line in self.lines if line.exceeds), None)

    def error_at(self, node: str) -> float | None:
        """The error at one node; None where it was not traced."""
        return next((line.error for line in self.lines if line.node == node), None)

    def sentence(self) -> str:
        """The same in words."""
        shipped = (
            ""
            if self.same_as_shipped
            else " The library in the artifact gives other bits: it was built from other kernels than this "
            "llmc's, so compile the model again before looking further."
        )
        if self.first is None:
            worst = max((line.error for line in self.lines), default=0.0)
            return f"The code for {self.level} follows the program at every node, to {worst:.2g}.{shipped}"
        line = self.first
        where = f" in {line.layer}" if line.layer else ""
        return (
            f"The code for {self.level} first leaves the program at node {line.node} ({line.operator})"
            f"{where}: {line.error:.2g} of its size, where {line.allowed:.2g} is allowed. "
            f"A kernel is to blame: see the statement of {line.node} in {CPU_SOURCE}.{shipped}"
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
    calls = {tap.node: tap for tap in source.taps}
    return CodeTrace(
        level=level,
        lines=tuple(_lines(program, expected, found.rows, calls)),
        same_as_shipped=torch.equal(found.logits, shipped.logits),
    )


def _lines(
    program: Program, expected: NodeRun, found: Mapping[str, Tensor], taps: Mapping[str, Tap]
) -> list[CodeLine]:
    lines: list[CodeLine] = []
    errors: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        above = max((errors.get(other, 0.0) for other in node.all_input_nodes), default=0.0)
        errors[node] = above
        if node.name not in found or node.name not in expected.rows:
            continue
        error = relative_error(expected.rows[node.name], found[node.name])
        lines.append(
            CodeLine(
                node=node.name,
                operator=operator_name(node.target),
                layer=layer_of(node),
                call=taps[node.name].call,
                error=error,
                allowed=max(_ROUNDING, _GROWTH * above),
            )
        )
        errors[node] = error
    return lines


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
