"""The part of an ONNX artifact that describes its graphs and stored codes: `onnx.json`. Knows no ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..spec.errors import ArtifactError

ONNX_UNIT = "onnx.json"
# The graph in ONNX Runtime GenAI's conventions, the one that the executor runs, and GenAI's settings.
ONNX_MODEL = "model.onnx"
ONNX_ENGINE = "engine.onnx"
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeShift:
    """The stored codes of weight `name` are the portable ones plus `shift`, modulo 2**bits."""

    name: str
    bits: int
    shift: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedZeros:
    """The zero points of weight `name`, `groups` in a row, are stored two to a byte."""

    name: str
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForms:
    """How stored weights differ from the portable ones. `alternating` names stacks of experts whose rows,
    gates and their partners, are stored in turn instead of one half after the other."""

    shifts: tuple[CodeShift, ...] = ()
    zeros: tuple[PackedZeros, ...] = ()
    alternating: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxCache:
    """The caches of one layer: names of inputs and outputs end in `layer`."""

    layer: int
    num_kv_heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxUnit:
    """What the graphs are and expect of their caller. `in_place` says whether caches are buffers with room
    that a step appends to, or what came before, from which a step makes longer ones. `operators` counts the
    nodes of the graph, subgraphs left out, by operator; `notes` say what could not be had, and why;
    `genai_problem` why ONNX Runtime GenAI cannot run the folder, empty where it can."""

    opset: int
    ir_version: int
    operators: dict[str, int]
    notes: tuple[str, ...]
    genai_problem: str
    in_place: bool
    caches: tuple[OnnxCache, ...]
    forms: StoredForms


def encode_onnx_unit(unit: OnnxUnit) -> bytes:
    """`unit` as the bytes of its file."""
    return msgspec.json.format(msgspec.json.encode(unit, order="deterministic"), indent=1) + b"\n"


def decode_onnx_unit(data: bytes) -> OnnxUnit:
    """Inverse of `encode_onnx_unit`. Raises ArtifactError for anything else."""
    try:
        return msgspec.json.decode(data, type=OnnxUnit)
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            "artifact.onnx_unit",
            "The description of the ONNX graphs cannot be read.",
            f"{ONNX_UNIT}: {error}.",
            "Compile the model again.",
        ) from error
