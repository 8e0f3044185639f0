"""The CPU executor: an artifact's generated code, chosen by what the processor offers. No torch."""

from __future__ import annotations

import platform
from pathlib import Path

from ...artifact.cpu import CPU_UNIT, CpuUnit, decode_unit, library_path
from ...artifact.reader import Artifact
from ...spec.errors import TargetError
from ..config import RuntimeConfig
from ..memory import available_memory_bytes
from ..page_budget import demand_of, num_pages
from ..protocol import ExecutorCaps
from .amx import usable_features
from .cpu_model import CpuModel
from .cpu_sampling import CpuSampled
from .processors import usable_processors
from .stepped import SteppedExecutor


def open_executor(artifact: Artifact, config: RuntimeConfig) -> SteppedExecutor:
    """The executor of an artifact of target kind `cpu`, with the best library that runs here; its weights are
    copied into large pages.

    Raises TargetError when no stored library runs on this processor.
    """
    unit = decode_unit(artifact.read_bytes(CPU_UNIT))
    return open_level(artifact, unit, choose_level(unit, processor_features()), config)


def open_level(artifact: Artifact, unit: CpuUnit, level: str, config: RuntimeConfig) -> SteppedExecutor:
    """The executor with the library of one ISA level, which must run on this processor."""
    return executor_of(*open_model(artifact, unit, level, config))


def executor_of(model: CpuModel, caps: ExecutorCaps) -> SteppedExecutor:
    """The executor over a model, which samples in its steps."""
    return SteppedExecutor(CpuSampled(model), caps)


def open_model(
    artifact: Artifact, unit: CpuUnit, level: str, config: RuntimeConfig
) -> tuple[CpuModel, ExecutorCaps]:
    """The generated code of one ISA level with its weights and caches, and what an executor of it offers."""
    spec, layout = artifact.manifest.spec, artifact.manifest.cache
    max_step_tokens = min(config.max_step_tokens, unit.max_tokens)
    demand = demand_of(config, spec.max_context, max_step_tokens)
    pages = num_pages(layout, demand, config.cache_bytes, available_memory_bytes())
    threads = min(config.num_threads or usable_processors(), unit.max_threads)
    stored = artifact.weights()
    model = CpuModel(
        artifact.path / library_path(level),
        unit,
        [stored[name].data for name in unit.weights],
        layout,
        pages,
        spec.vocab_size,
        threads,
    )
    caps = ExecutorCaps(
        name="cpu",
        vocab_size=spec.vocab_size,
        max_context=spec.max_context,
        max_rows=config.max_requests,
        max_tokens=max_step_tokens,
        max_in_flight=1,
        cache=layout,
        num_blocks=pages,
        details={"level": level, "threads": str(threads)},
    )
    return model, caps


def runnable_levels(unit: CpuUnit, features: frozenset[str]) -> list[str]:
    """The stored levels whose needs `features` meet, best first."""
    return [level.name for level in unit.levels if features.issuperset(level.features)]


def choose_level(unit: CpuUnit, features: frozenset[str]) -> str:
    """The best stored level whose needs `features` meet. Raises TargetError naming what is missing."""
    runnable = runnable_levels(unit, features)
    if runnable:
        return runnable[0]
    last = unit.levels[-1]
    missing = sorted(set(last.features) - features)
    raise TargetError(
        "cpu.no_level",
        "No library of this artifact runs on this processor.",
        f"Even level {last.name!r} needs {', '.join(missing)}.",
        "Compile the model on this machine.",
    )


def processor_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The words of the processor's feature list, as far as this process may use them; empty where the system
    tells none."""
    if not path.exists() or platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return usable_features(frozenset(line.partition(":")[2].split()))
    return frozenset()
