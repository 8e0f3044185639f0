"""The report that every artifact carries: size, quality and what the passes did. The same bytes whenever and
wherever it is made: no clock, no path, no host."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from ..ir.program import Program
from ..passes.bits import bits_per_weight
from ..passes.calibration import Calibration
from .onnx_check import BackendQuality
from .quality import Quality


def report_data(
    program: Program,
    *,
    recipe: str,
    verify: str,
    quality: Quality,
    calibration: Calibration | None = None,
    backend: BackendQuality | None = None,
) -> dict[str, Any]:
    """The content of report.json; `backend` where the target's executor was compared with the reference."""
    return {
        "recipe": recipe,
        "verify": verify,
        "size": {
            "num_parameters": program.spec.num_parameters,
            "weight_bytes": program.weights.total_bytes,
            "bits_per_weight": bits_per_weight(program),
            "largest_weights": _largest(program),
        },
        "memory": _memory(program),
        "quality": quality.as_dict(),
        "backend": {} if backend is None else asdict(backend),
        "calibration": _calibration(calibration),
        "passes": [asdict(record) for record in program.history],
        "choices": program.spec.choices,
    }


def encode_report(data: dict[str, Any]) -> bytes:
    """The bytes of report.json."""
    encoded = msgspec.json.encode(data, order="deterministic")
    return msgspec.json.format(encoded, indent=1) + b"\n"


def _calibration(calibration: Calibration | None) -> dict[str, Any]:
    if calibration is None or not calibration.sequences:
        return {}
    return {
        "source": calibration.source,
        "sequences": len(calibration.sequences),
        "tokens": calibration.num_tokens,
        "sha256": calibration.cache_key(),
    }


def _memory(program: Program) -> dict[str, Any]:
    if program.memory is None:
        return {}
    fields = asdict(program.memory)
    fields.pop("arena")
    return fields


def _largest(program: Program, count: int = 5) -> list[dict[str, Any]]:
    sizes = sorted(((program.weights.num_bytes(name), name) for name in program.weights), reverse=True)
    return [{"name": name, "bytes": size} for size, name in sizes[:count]]
