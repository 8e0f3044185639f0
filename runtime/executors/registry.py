"""Which executor runs which kind of target. Executors are imported when one is asked for, so that serving
needs only what its own target needs."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from ...artifact.reader import Artifact
from ...spec.errors import TargetError
from ..config import RuntimeConfig
from ..protocol import Executor

# Target kind -> module with a function `open_executor(artifact, config) -> Executor`.
_EXECUTORS = {"cpu": ".cpu", "cuda": ".cuda", "onnx": ".onnxruntime", "reference": ".reference"}
# Library that an executor may miss -> the extra that brings it.
_EXTRAS = {"torch": "compile", "triton": "cuda", "onnxruntime": "onnx"}


def open_executor(artifact: Artifact, config: RuntimeConfig) -> Executor:
    """Loads `artifact` with the executor of its target.

    Raises TargetError when this version has none for the target's kind, or a library it needs is missing.
    """
    target = artifact.manifest.target
    if target.kind not in _EXECUTORS:
        raise TargetError(
            "target.no_executor",
            f"The artifact was compiled for the target {target.name!r}.",
            f"This version of llmc runs: {', '.join(_EXECUTORS)}.",
            "Update llmc, or compile the model for one of these targets.",
        )
    try:
        module = import_module(_EXECUTORS[target.kind], __package__)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise TargetError(
            "target.missing_library",
            f"The target {target.name!r} needs the library {error.name}.",
            "It is not installed in this environment.",
            f"Install it with `pip install 'llmc-compiler[{_EXTRAS[error.name]}]'`, or use an artifact of "
            "another target.",
        ) from error
    return cast("Executor", module.open_executor(artifact, config))
