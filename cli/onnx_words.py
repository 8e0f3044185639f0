"""What `llmc compile` and `llmc inspect` say about the graphs of an ONNX artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..artifact.reader import Artifact


def onnx_facts(artifact: Artifact) -> dict[str, Any]:
    """What the graphs of an ONNX artifact are, and how close they come to the reference backend."""
    import msgspec

    from ..artifact.onnx import ONNX_UNIT, decode_onnx_unit
    from ..artifact.schema import REPORT

    unit = decode_onnx_unit(artifact.read_bytes(ONNX_UNIT))
    return {
        "opset": unit.opset,
        "ir_version": unit.ir_version,
        "operators": unit.operators,
        "notes": list(unit.notes),
        "genai_problem": unit.genai_problem,
        "quality": msgspec.json.decode(artifact.read_bytes(REPORT)).get("backend", {}),
    }


def onnx_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same in words; none without facts."""
    if not facts:
        return []
    rows = [
        ("graph", f"ONNX opset {facts['opset']}, IR version {facts['ir_version']}, computed in float32"),
        ("operators", ", ".join(f"{count} {name}" for name, count in facts["operators"].items())),
        *(("note", note) for note in facts["notes"]),
        (
            "ONNX GenAI",
            f"no: {facts['genai_problem']}" if facts["genai_problem"] else "runs the folder as it is",
        ),
    ]
    for name, words in (("from_reference", "from reference"), ("from_original", "from original")):
        found = facts["quality"][name]
        top = f"same top token {100 * found['same_top']:.1f} %"
        rows.append((words, f"mean KL {found['kl_mean']:.3g}, {top}, max logit error {found['max_abs']:.3g}"))
    return rows


def onnx_limits(artifact: Artifact) -> list[tuple[str, str]]:
    """What the compiled model cannot have of ONNX Runtime, and why."""
    facts = onnx_facts(artifact)
    return [
        *(("note", note) for note in facts["notes"]),
        *((("ONNX GenAI", f"no: {facts['genai_problem']}"),) if facts["genai_problem"] else ()),
    ]
