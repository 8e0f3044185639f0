"""What the launches of a CUDA artifact compute at every node, against the program they were made of, and
whether its machine code is what those launches ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import fx

from ..artifact.cuda import CUDA_UNIT, decode_unit
from ..artifact.reader import Artifact
from ..codegen.cuda.shipped import foreign_kernels, is_comparable
from ..ir.program import Program
from ..ir.vocabulary import operator_name
from ..kernels.cuda.launch import Specialisation
from ..spec.errors import TargetError
from .cache.config import CacheConfig
from .cache.session import CompileCache
from .code_lines import CodeLine, CodeTrace, code_lines
from .kernel_run import KernelRun, run_interpreted, run_on_gpu
from .node_values import NodeRun

_PART = "launch"


class Compared(NamedTuple):
    """What came of compiling the kernels of a run once more: by key what of the artifact's machine code is
    other code, whether all of it is the same, and that in words."""

    foreign: Mapping[str, str]
    is_same: bool
    note: str


def trace_kernels(
    artifact: Artifact, program: Program, expected: NodeRun, prompts: Sequence[tuple[int, ...]]
) -> tuple[CodeTrace, NodeRun]:
    """Run the launches of an artifact on `prompts`: its machine code where there is a GPU, else the kernels'
    source by triton's interpreter. `expected` is what `program`, its final one, computes on them.

    Raises TargetError where there is neither a GPU nor triton, or the GPU runs none of the kernels;
    ArtifactError for launches of another version of llmc.
    """
    if torch.cuda.is_available():
        run, name = run_on_gpu(artifact, prompts)
        code = f"The machine code of the kernels, run on {name} launch by launch,"
        return _trace(code, program, expected, run, Compared({}, True, "")), run.nodes
    _require_interpreter()
    run = run_interpreted(artifact.path, prompts)
    code = "The source of the kernels, run by triton's interpreter on the CPU for want of a GPU,"
    return _trace(code, program, expected, run, compare_code(artifact, run)), run.nodes


def compare_code(artifact: Artifact, run: KernelRun) -> Compared:
    """Hold the artifact's machine code of the kernels of `run` to what they compile to."""
    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    wanted = {each.key: each for found in run.launches.values() for each in found}
    if not is_comparable(unit):
        note = (
            f"Its machine code was compiled by triton {unit.triton}, which is not installed, and was not "
            "looked at: trace it where that version or a GPU is."
        )
        return Compared({}, False, note)
    with CompileCache(CacheConfig.from_environment()) as cache:
        foreign = foreign_kernels(artifact, unit, list(wanted.values()), cache.recall_bytes)
    if len(foreign) == len(wanted):
        note = (
            f"The artifact's machine code is that of other kernels than this llmc's, for all {len(wanted)} "
            "of them: compile the model again before looking further."
        )
        return Compared({}, False, note)
    architectures = ", ".join(unit.architectures)
    if foreign:
        note = f"Its machine code was compiled once more, for {architectures}, and compared."
        return Compared(foreign, False, note)
    note = (
        f"The artifact's machine code for {architectures} is what that source compiles to, to the byte, in "
        f"all {len(wanted)} kernels; what tensor cores round, and races, only a GPU can show."
    )
    return Compared({}, True, note)


def _trace(code: str, program: Program, expected: NodeRun, run: KernelRun, compared: Compared) -> CodeTrace:
    launches = _launches_by_node(program, run.launches)
    calls = {name: _words(found) for name, found in launches.items()}
    lines = code_lines(program, expected, run.nodes.rows, calls)
    lines = tuple(_with_foreign(line, launches[line.node], compared.foreign) for line in lines)
    told = {each.key for line in lines for each in launches[line.node]}
    return CodeTrace(
        code=code,
        part=_PART,
        file=CUDA_UNIT,
        lines=lines,
        same_as_shipped=compared.is_same,
        difference=" ".join([compared.note, *_untold(run.launches, compared.foreign, told)]),
    )


def _launches_by_node(
    program: Program, launches: Mapping[str, tuple[Specialisation, ...]]
) -> dict[str, tuple[Specialisation, ...]]:
    """What made each node's value: its own launches, else those of what it is a part of; none where torch
    computes it."""
    found: dict[str, tuple[Specialisation, ...]] = {}
    for node in program.graph.nodes:
        source = node
        while source.name not in launches and _is_part(source):
            source = source.all_input_nodes[0]
        found[node.name] = launches.get(source.name, ())
    return found


def _is_part(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node.target).endswith("getitem")


def _words(launches: Sequence[Specialisation]) -> str:
    """Kernels by name, each once; an operator of torch's has none."""
    return ", ".join(dict.fromkeys(each.kernel for each in launches)) or "torch's own"


def _with_foreign(line: CodeLine, launches: Sequence[Specialisation], foreign: Mapping[str, str]) -> CodeLine:
    reasons = [f"`{each.kernel}` has {foreign[each.key]}" for each in launches if each.key in foreign]
    return replace(line, foreign="; ".join(dict.fromkeys(reasons)))


def _untold(
    launches: Mapping[str, tuple[Specialisation, ...]], foreign: Mapping[str, str], told: set[str]
) -> list[str]:
    """Of kernels whose nodes have no rows to compare, such as what writes the cache, what is foreign."""
    return [
        f"Of node {name} `{each.kernel}` has {foreign[each.key]}."
        for name, found in launches.items()
        for each in dict.fromkeys(found)
        if each.key in foreign and each.key not in told
    ]


def _require_interpreter() -> None:
    if find_spec("triton") is None:
        raise TargetError(
            "cuda.trace",
            "The kernels of this artifact cannot be run here.",
            "There is no GPU, and the library triton, whose interpreter runs them without one, is not "
            "installed.",
            "Install it with `pip install 'llmc-compiler[cuda]'`, or trace it on a machine with a GPU.",
        )
