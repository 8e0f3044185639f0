"""What can be asked of the ONNX target with `--set onnx.NAME=VALUE`, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ...spec.target import Target
from ...spec.target_options import TARGET_OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """Options of one export; `spec.target_options` says what each does."""

    contrib: bool
    logits: str
    file_bytes: int

    @staticmethod
    def of(target: Target) -> OnnxOptions:
        """The options that `target` carries, defaults where it carries none."""
        defaults = {option.name: option.default for option in TARGET_OPTIONS["onnx"]}
        values = defaults | target.options
        return OnnxOptions(
            contrib=cast("bool", values["contrib"]),
            logits=cast("str", values["logits"]),
            file_bytes=cast("int", values["file_bytes"]),
        )
