"""Targets as frozen data: what a machine family offers, never how it is programmed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import TargetError

OptionValue = bool | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where an artifact runs. `kind` selects the backend and the executor.

    `levels` are ISA levels (cpu) or architectures (cuda); `page_tokens` is the default KV page and
    `cache_dtype` that of cached values ("": the compute dtype). `options` are those of
    `spec.target_options`.
    """

    kind: str
    levels: tuple[str, ...] = ()
    device: str = "cpu"
    page_tokens: int = 32
    cache_dtype: str = ""
    features: dict[str, str] = field(default_factory=dict[str, str])
    options: dict[str, OptionValue] = field(default_factory=dict[str, OptionValue])

    @property
    def name(self) -> str:
        """The target as the command line spells it."""
        return f"{self.kind}:{','.join(self.levels)}" if self.levels else self.kind

    @property
    def narrows_rows(self) -> bool:
        """Whether its steps take fewer rows behind the last attention than before it. A GPU's recorded step
        has as many rows of logits as tokens; the ONNX target narrows rows in its own graph."""
        return self.kind in ("cpu", "reference")


REFERENCE = Target(kind="reference")

CPU = Target(kind="cpu")

# Generations of NVIDIA GPUs that kernels are compiled for: A100, RTX 40 and L4, H100 and H200, B200.
CUDA_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")

CUDA = Target(kind="cuda", levels=("sm_80", "sm_90"), device="cuda", page_tokens=64)

ONNX = Target(kind="onnx", cache_dtype="float32")

KNOWN: dict[str, Target] = {"cpu": CPU, "cuda": CUDA, "onnx": ONNX, "reference": REFERENCE}


def parse_target(text: str) -> Target:
    """The target called `text`: a name of `KNOWN`, or `cuda:` and the architectures to compile for.

    Raises TargetError naming those that exist.
    """
    if text in KNOWN:
        return KNOWN[text]
    kind, _, levels = text.partition(":")
    if kind == "cuda":
        return replace(CUDA, levels=_architectures(levels))
    raise TargetError(
        "target.unknown",
        f"There is no target {text!r}.",
        f"This version of llmc generates code for: {', '.join(KNOWN)}.",
        "Choose one of these with --target; `llmc targets` says what each needs.",
    )


def _architectures(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in CUDA_ARCHITECTURES]
    if unknown:
        raise TargetError(
            "target.unknown_architecture",
            f"There is no GPU architecture {unknown[0]!r}.",
            f"Kernels can be compiled for {', '.join(CUDA_ARCHITECTURES)}.",
            "Write the target like cuda:sm_90 or cuda:sm_80,sm_90.",
        )
    return names
