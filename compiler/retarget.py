"""New kernels for an artifact of the target `cuda`, from its own program and weights: for other GPUs, or as
measured on the one of this machine. The original model is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..artifact.cuda import CUDA_UNIT, CudaUnit, decode_unit
from ..artifact.reader import Artifact, open_artifact
from ..artifact.writer import ArtifactWriter
from ..codegen.base import RecallBytes
from ..ir.program import Program
from ..ir.weights import WeightStore
from ..kernels.cuda.variant_table import Choices, newest
from ..spec.errors import TargetError
from ..spec.target import Target, parse_target
from .cache.config import CacheConfig
from .cache.session import CompileCache

if TYPE_CHECKING:
    from ..codegen.cuda.tuning import Measured, Site

# Measures the products of a program: (sites, weights) -> findings, and the device's name.
Tuner = Callable[["Sequence[Site]", WeightStore], "tuple[list[Measured], str]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retargeted:
    """The new artifact, how many kernels it has, and of each class of products what was measured."""

    artifact: Artifact
    num_kernels: int
    measured: Sequence[Measured] = ()


def retarget_artifact(
    path: Path,
    output: Path,
    *,
    target: str | None = None,
    tune: bool = False,
    force: bool = False,
    tuner: Tuner | None = None,
) -> Retargeted:
    """Write the artifact at `path` to `output` with the kernels of this version of llmc, for `target` (its
    own where none is named), tuned on this machine's GPU with `tune`.

    Raises TargetError for an artifact or target of another kind than `cuda`, and where there is no GPU to
    measure on; ArtifactError for a damaged artifact; UsageError where `output` exists.
    """
    artifact = open_artifact(path)
    wanted = artifact.manifest.target if target is None else parse_target(target)
    _expect_cuda(artifact, wanted)
    measure = (tuner or device_tuner()) if tune else None
    from ..codegen.cuda.backend import write_kernels
    from ..codegen.cuda.dry_walk import needs_of
    from ..codegen.cuda.tuning import choices, sites_of

    unit = decode_unit(artifact.read_bytes(CUDA_UNIT))
    program = program_of(artifact, unit)
    weights = {name: program.weights[name] for name in program.weights}
    findings: list[Measured] = []
    where = ""
    if measure is not None:
        findings, where = measure(sites_of(program, weights), program.weights)
    taken = Choices(newest(wanted.levels), choices(findings), where)
    with (
        ArtifactWriter(output, force=force, needed_bytes=artifact.size_bytes) as writer,
        CompileCache(CacheConfig.from_environment()) as cache,
    ):
        _copy_others(artifact, writer)
        recall: RecallBytes = cache.recall_bytes
        needs = needs_of(program, weights, taken)
        made = write_kernels(needs, wanted.levels, unit.words, writer, taken.taken, recall, where)
        manifest = replace(artifact.manifest, target=wanted)
        return Retargeted(
            artifact=writer.commit(manifest), num_kernels=len(made.kernels), measured=tuple(findings)
        )


def program_of(artifact: Artifact, unit: CudaUnit) -> Program:
    """The final program of an artifact, its weights as they are stored: codes as words."""
    from ..runtime.executors.cuda import stored_program

    stored, manifest = stored_program(artifact, unit), artifact.manifest
    return Program(
        graph=stored.document.graph,
        inputs=stored.document.inputs,
        weights=stored.weights,
        spec=manifest.spec,
        facts=stored.document.facts,
        cache=manifest.cache,
        memory=manifest.memory,
        capture=manifest.capture,
        history=manifest.history,
    )


def device_tuner() -> Tuner:
    """Measures on this machine's GPU. Raises TargetError where there is none."""
    if not torch.cuda.is_available():
        raise TargetError(
            "cuda.tune_no_device",
            "Kernels cannot be tuned here.",
            "Which of them is fastest is measured, and torch finds no NVIDIA GPU on this machine.",
            "Run `llmc retarget --tune` where the artifact is to be served, or leave --tune out: the shipped "
            "choices are used then.",
        )
    from .device_tuner import measure_on_device

    return measure_on_device


def _expect_cuda(artifact: Artifact, target: Target) -> None:
    kinds = (artifact.manifest.target.kind, target.kind)
    if kinds == ("cuda", "cuda"):
        return
    raise TargetError(
        "target.retarget",
        "Only kernels for NVIDIA GPUs can be made again without the model.",
        f"The artifact is for {artifact.manifest.target.name}, and {target.name} was asked for; weights of "
        "other targets are packed in other layouts.",
        f"Compile the original model with --target {target.name}.",
    )


def _copy_others(artifact: Artifact, writer: ArtifactWriter) -> None:
    """All files but those of kernels, unchanged."""
    for entry in artifact.manifest.files:
        if entry.kind != "kernel":
            writer.copy_file(entry.path, entry.kind, artifact.path / entry.path)
