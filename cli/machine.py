"""Facts about this installation and this machine that decide what llmc can do on it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util

from .output import human_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer: whether `subject` is there, and what that means."""

    subject: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """All findings, in the order a reader wants them. Imports none of the libraries it looks for."""
    compiling = [_library("torch"), _library("transformers")]
    ready = all(found.ok for found in compiling)
    return [
        Finding("python", True, platform.python_version()),
        Finding("processor", True, f"{os.cpu_count()} cores, {platform.machine()}"),
        Finding("memory", True, _memory()),
        Finding("disk", True, f"{human_bytes(shutil.disk_usage('.').free)} free here"),
        *compiling,
        Finding("compile models", ready, "ready" if ready else "pip install 'llmc-compiler[compile]'"),
        *_cpu_target(),
        Finding(
            "run target reference",
            compiling[0].ok,
            "ready" if compiling[0].ok else "its executor interprets programs with torch",
        ),
    ]


def _cpu_target() -> list[Finding]:
    """Whether code can be generated for this processor, and at which level it runs."""
    from ..kernels.levels import LEVELS, missing_features
    from ..runtime.executors.cpu import processor_features

    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    features = processor_features()
    best = [level for level in LEVELS if not missing_features(level, features)][-1]
    better = LEVELS[LEVELS.index(best) + 1 :]
    why = f"; {better[0].name} needs {_lack(missing_features(better[0], features))}" if better else ""
    return [
        Finding(
            "compile for target cpu",
            compiler is not None,
            f"with {compiler}" if compiler else "no C++ compiler: `apt install g++`, or --target reference",
        ),
        Finding("run target cpu", True, f"at level {best.name}{why}"),
    ]


def _lack(missing: tuple[str, ...]) -> str:
    words = ", ".join(missing)
    return f"{words} (of the processor, and leave of the system)" if "amx_tile" in missing else words


def _library(name: str) -> Finding:
    if util.find_spec(name) is None:
        return Finding(name, False, "not installed")
    return Finding(name, True, metadata.version(name))


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"{human_bytes(total)}, {human_bytes(free)} unused"
