"""Whether the machine code in an artifact is what its launches ask for: each kernel compiled once more and
compared. For finding faults; a GPU is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from ...artifact.cuda import CudaKernel, CudaUnit
from ...artifact.reader import Artifact
from ...kernels.cuda.launch import Specialisation
from ..base import RecallBytes, compute_bytes
from .assemble import Machine, assemble


def foreign_kernels(
    artifact: Artifact,
    unit: CudaUnit,
    wanted: Sequence[Specialisation],
    recall: RecallBytes = compute_bytes,
) -> Mapping[str, str]:
    """Of the kernels `wanted`, by key, those whose entry in the launch table is not what they compile to, for
    any architecture, and what differs. `unit` must be of the installed triton, whose compiler gives the same
    bytes every time.

    Raises TargetError without triton.
    """
    table = {(kernel.key, kernel.architecture): kernel for kernel in unit.kernels}
    asked = [(each, name) for name in unit.architectures for each in wanted if (each.key, name) in table]
    found: dict[str, list[str]] = {}
    for (specialisation, name), machine in zip(asked, assemble(asked, recall), strict=True):
        kernel = table[specialisation.key, name]
        differs = _difference(kernel, machine, artifact.read_bytes(kernel.file))
        if differs:
            found.setdefault(specialisation.key, []).append(f"{differs} for {name}")
    return {key: ", ".join(reasons) for key, reasons in found.items()}


def is_comparable(unit: CudaUnit) -> bool:
    """Whether the installed triton is the one that compiled the artifact."""
    return unit.triton == version("triton")


def _difference(kernel: CudaKernel, machine: Machine, cubin: bytes) -> str:
    """What of a kernel's entry is not as compiled; empty where all is."""
    if cubin != machine.cubin:
        return f"other machine code in {kernel.file}"
    stored = (kernel.name, kernel.warps, kernel.shared_bytes)
    expected = (machine.name, machine.warps, machine.shared_bytes)
    if stored != expected:
        return f"name, warps and shared memory {stored} instead of {expected}"
    return ""
