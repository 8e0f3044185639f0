"""JSON files of a model folder, read with errors that name the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from ..spec.errors import ModelError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            "model.unreadable_json",
            f"{path.name} cannot be read.",
            f"It is not valid JSON: {error}.",
            "Restore the file from where the model came from.",
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            "model.unreadable_json",
            f"{path.name} cannot be used.",
            f"It holds a JSON {type(value).__name__} where an object is expected.",
            "Restore the file from where the model came from.",
        )
    return cast("dict[str, Any]", value)
