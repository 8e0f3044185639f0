"""What every backend offers: a finished Program becomes the files of an artifact. Backends are found by the
kind of the target, and imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from ..artifact.reader import Artifact
from ..artifact.writer import ArtifactWriter
from ..ir.program import Program
from ..ir.weights import Expr, WeightStore
from ..spec.errors import TargetError
from ..spec.target import Target
from .programs import WeightProgress

# Target kind -> module with a class `Backend`, made with the target.
_BACKENDS = {
    "cpu": ".cpu.backend",
    "cuda": ".cuda.backend",
    "onnx": ".onnx.backend",
    "reference": ".reference.backend",
}
# Library that a backend may miss -> the extra that brings it.
_EXTRAS = {"onnx_ir": "onnx", "triton": "cuda"}
# Target kind -> libraries that a compile uses late: an ONNX graph is run once before it is kept.
_USED_LATE = {"onnx": ("onnx_ir", "onnx", "onnxruntime")}


class RecallBytes(Protocol):
    """Gives the bytes that `compute` makes of `inputs` (all it depends on), computed or remembered."""

    def __call__(self, inputs: tuple[object, ...], label: str, compute: Callable[[], bytes]) -> bytes: ...


def compute_bytes(inputs: tuple[object, ...], label: str, compute: Callable[[], bytes]) -> bytes:
    """A `RecallBytes` that remembers nothing."""
    return compute()


class Backend(Protocol):
    """Writes the target-dependent part of an artifact, and the programs.

    The manifest, the tokenizer, the oracle and the report are the driver's, and the same for all targets.
    """

    def estimate_bytes(self, program: Program, portable: Program) -> int:
        """Upper bound of the bytes that `emit` writes, known before any weight is evaluated."""
        ...

    def stored_form(self, program: Program, portable: Program) -> WeightStore:
        """The weights that `emit` writes, by the names they are stored under; none is evaluated."""
        ...

    def emit(
        self,
        program: Program,
        portable: Program,
        writer: ArtifactWriter,
        progress: Callable[[WeightProgress], None] | None = None,
        cache: RecallBytes = compute_bytes,
    ) -> None:
        """Writes programs, weights and code, telling `progress` before each weight; what takes long to
        generate is asked of `cache`.

        `program` is final, `portable` is what it was before the lay-out stage; both read the same weights
        under the same names, or weights of their own.
        """
        ...

    def stored_weights(self, artifact: Artifact) -> Mapping[str, Expr]:
        """The weights of the programs, by name, read back from what `emit` wrote."""
        ...


def default_target() -> str:
    """The target that this machine can build for best: `cpu` with a C++ compiler, else `reference`."""
    from .cpu.toolchain import find_compiler

    try:
        find_compiler()
    except TargetError:
        return "reference"
    return "cpu"


def check_installed(target: Target) -> None:
    """Raises TargetError naming a library that compiling for `target` would miss hours later."""
    for name in _USED_LATE.get(target.kind, ()):
        if find_spec(name) is None:
            raise _missing(target, name, target.kind)


def backend_for(target: Target) -> Backend:
    """The backend of `target`. Raises TargetError when there is none for its kind, or a library it needs is
    missing."""
    if target.kind not in _BACKENDS:
        raise TargetError(
            "target.no_backend",
            f"No code can be generated for the target {target.name!r}.",
            f"This version of llmc generates code for: {', '.join(_BACKENDS)}.",
            "Choose one of these with --target.",
        )
    try:
        module = import_module(_BACKENDS[target.kind], __package__)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise _missing(target, str(error.name), _EXTRAS[error.name]) from error
    return cast("Backend", module.Backend(target))


def _missing(target: Target, library: str, extra: str) -> TargetError:
    return TargetError(
        "target.missing_library",
        f"Generating code for {target.name!r} needs the library {library}.",
        "It is not installed in this environment.",
        f"Install it with `pip install 'llmc-compiler[{extra}]'`.",
    )
