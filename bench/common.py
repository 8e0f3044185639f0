"""What every bench shares: the description of the machine, percentiles, and the result file's form."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("llmc-compiler", "torch", "transformers", "numpy", "triton")
ISA_FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def describe_machine() -> dict[str, object]:
    """The hardware, the system and the libraries: everything a number depends on and cannot say itself."""
    cpu = _first_cpu()
    return {
        "cpu": cpu.get("model name", platform.processor() or "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ISA_FLAGS if flag in cpu.get("flags", "").split()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """`p50`, `p90`, `p99` and `n`; a percentile is the smallest sample that at least that share does not
    exceed. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples to take percentiles of")
    ordered = sorted(samples)
    found: dict[str, float] = {
        f"p{share}": ordered[max(0, -(-share * len(ordered) // 100) - 1)] for share in (50, 90, 99)
    }
    return {**found, "n": len(ordered)}


def median_interval(samples: Sequence[float]) -> dict[str, float]:
    """The median with its distribution-free interval of at least 95 % (all samples where there are fewer than
    six): order statistics whose ranks are where a fair coin's counts leave 2.5 % on either side. Raises
    ValueError for no samples."""
    if not samples:
        raise ValueError("no samples to take the median of")
    ordered, count = sorted(samples), len(samples)
    weight, below, rank = 0.5**count, 0.0, 0
    while below + weight <= 0.025:
        below += weight
        weight *= (count - rank) / (rank + 1)
        rank += 1
    low, high = ordered[max(0, rank - 1)], ordered[min(count - 1, count - rank)]
    return {"median": statistics.median(ordered), "low": low, "high": high, "n": count}


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Record:
    """One run of one bench. Notes how busy others kept the machine between its making and its writing."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name = name
        self.folder = folder
        self.started = time.monotonic()
        self.busy_before = _busy_seconds()
        self.own_before = _own_seconds()

    def write(self, results: Mapping[str, object]) -> Path:
        """Write NAME.json, replacing an earlier one, and return its path."""
        content = {
            "bench": self.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *map(_without_folders, sys.argv)]),
            "machine": describe_machine(),
            "wall_s": round(time.monotonic() - self.started, 1),
            "foreign_cpu_share": self._foreign_share(),
            "results": results,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    def _foreign_share(self) -> float | None:
        """The share of all processors' time that other processes used; None where the system hides it."""
        busy_after = _busy_seconds()
        if self.busy_before is None or busy_after is None:
            return None
        foreign = (busy_after - self.busy_before) - (_own_seconds() - self.own_before)
        available = (time.monotonic() - self.started) * (os.cpu_count() or 1)
        return round(max(0.0, foreign) / max(available, 1e-9), 3)


def _without_folders(argument: str) -> str:
    """An argument whose absolute path, if it is or ends in one, is cut to its last part: where things lay on
    the machine says nothing about a number."""
    return re.sub(r"(^|=)/(?:[^/]*/)*", r"\1", argument)


def _busy_seconds() -> float | None:
    """Processor seconds that all processes have used since boot, over all processors."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _first_cpu() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _gpu() -> str | None:
    return _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or None


def _commit() -> str | None:
    """The commit measured, marked when the work tree differed from it."""
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit
