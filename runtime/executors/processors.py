"""How many processors this process may use. Knows the system's files; nothing of engines."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_processors(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Processors of the affinity mask, and no more than the CPU quota of the process's control groups grants,
    rounded up: more threads than that would be stopped in the middle of a step. At least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(cgroups, own)
    return allowed if quota is None else max(1, min(allowed, ceil(quota)))


def cpu_quota(cgroups: Path, own: Path) -> float | None:
    """The smallest quota, in processors, of the control groups that hold this process (version 2, or version
    1's `cpu` controller); None without one."""
    quotas: list[float] = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        root = cgroups
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            root = cgroups / controllers
        folder = root / path.strip("/")
        while folder.is_relative_to(root):
            quotas += _quotas_in(folder)
            folder = folder.parent
    return min(quotas, default=None)


def _quotas_in(folder: Path) -> list[float]:
    """The quota that one control group sets, if any."""
    newer = _words(folder / "cpu.max")
    if len(newer) == 2 and newer[0] != "max":
        return [int(newer[0]) / int(newer[1])]
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return [int(quota[0]) / int(period[0])]
    return []


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
