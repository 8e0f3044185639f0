"""A program's graph, inputs and facts as one JSON document, a node a line. Weights, plans and the facts of
the model are stored elsewhere, and come back from there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from torch import fx

from ..spec.errors import ArtifactError
from .program import GraphInput, Program
from .serialize import graph_from_data, graph_to_data


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramDocument:
    """What `program.json` holds. `graph` carries no inferred values."""

    graph: fx.Graph
    inputs: tuple[GraphInput, ...]
    facts: frozenset[str]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    inputs: tuple[GraphInput, ...]
    facts: tuple[str, ...]
    nodes: list[dict[str, Any]]


def encode_program(program: Program) -> bytes:
    """The document of `program`: the same bytes for the same program."""
    lines = [
        '{"inputs": [',
        ",\n".join(_line(asdict(entry)) for entry in program.inputs),
        '], "facts": ' + _line(sorted(program.facts)) + ', "nodes": [',
        ",\n".join(_line(node) for node in graph_to_data(program.graph)),
        "]}\n",
    ]
    return "\n".join(lines).encode()


def decode_program(data: bytes) -> ProgramDocument:
    """Inverse of `encode_program`.

    Raises ArtifactError for bytes that are no such document, and for an operator that this version lacks.
    """
    try:
        document = msgspec.json.decode(data, type=_Document)
        graph = graph_from_data(document.nodes)
        graph.lint()
        if [node.op for node in graph.nodes].count("output") != 1:
            raise ValueError("it has no single result")
    except (
        msgspec.MsgspecError,
        UnicodeDecodeError,
        KeyError,
        IndexError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ArtifactError(
            "artifact.program",
            "The stored program cannot be read.",
            f"It is not a program document ({type(error).__name__}: {error}).",
            "Copy the artifact again, or compile the model again.",
        ) from error
    inputs = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    if inputs != tuple(entry.name for entry in document.inputs):
        raise ArtifactError(
            "artifact.program",
            "The stored program cannot be read.",
            f"Its graph takes {list(inputs)}, which are not the inputs it declares.",
            "Compile the model again.",
        )
    return ProgramDocument(graph=graph, inputs=document.inputs, facts=frozenset(document.facts))


def _line(value: object) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()
