"""How each side's logits differ from a reference's, on text: by interpreting what each artifact stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...artifact.reader import Artifact
from ...artifact.schema import PORTABLE_PROGRAM, PROGRAM
from ...codegen.base import backend_for
from ...ir.document import decode_program
from ...ir.program import Program
from ...ir.weights import Reader, WeightStore
from ...passes.probe import logits_of
from ..node_values import relative_error, run_nodes
from ..quality import Quality, compare

_ATTENTION = ("paged_attention",)


def stored_program(artifact: Artifact) -> Program:
    """The final program of an artifact, its weights read from the files."""
    return _stored(artifact, PROGRAM)


def portable_program(artifact: Artifact) -> Program:
    """The program of an artifact before it was laid out, over the same weights."""
    return _stored(artifact, PORTABLE_PROGRAM)


def _stored(artifact: Artifact, file: str) -> Program:
    document = decode_program(artifact.read_bytes(file))
    manifest = artifact.manifest
    stored = backend_for(manifest.target).stored_weights(artifact)
    return Program(
        graph=document.graph,
        inputs=document.inputs,
        weights=WeightStore(dict(stored), {}, Reader()),
        spec=manifest.spec,
        facts=document.facts,
        cache=manifest.cache,
        memory=manifest.memory,
        history=manifest.history,
    )


def qualities(
    programs: Mapping[str, Program], reference: str, sequences: Sequence[Sequence[int]]
) -> dict[str, Quality]:
    """`Quality` of each program against `reference`, on token sequences."""
    expected = logits_of(programs[reference], sequences)
    return {
        name: compare(expected, expected if name == reference else logits_of(program, sequences), sequences)
        for name, program in programs.items()
    }


def layer_errors(
    programs: Mapping[str, Program], reference: str, sequences: Sequence[Sequence[int]]
) -> dict[str, tuple[float, ...]]:
    """The relative error of each attention layer's output against the reference's, and last that of the
    logits."""
    expected = _attention_outputs(programs[reference], sequences)
    return {
        name: tuple(
            relative_error(one, other)
            for one, other in zip(expected, _attention_outputs(program, sequences), strict=True)
        )
        for name, program in programs.items()
    }


def _attention_outputs(program: Program, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    run = run_nodes(program, sequences)
    names = [
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and any(word in str(node.target) for word in _ATTENTION)
    ]
    return [*(run.rows[name] for name in names), run.logits]
