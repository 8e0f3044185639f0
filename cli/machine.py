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
        Finding(
            "run target reference",
            compiling[0].ok,
            "ready" if compiling[0].ok else "its executor interprets programs with torch",
        ),
    ]


def _library(name: str) -> Finding:
    if util.find_spec(name) is None:
        return Finding(name, False, "not installed")
    return Finding(name, True, metadata.version(name))


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"{human_bytes(total)}, {human_bytes(free)} unused"
