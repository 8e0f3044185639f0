"""How much memory this machine has left. Linux only, like the rest of the runtime."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates it and the memory limit of
    the control group allows."""
    available = _from_meminfo(Path("/proc/meminfo"))
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used + _file_cache(group / "memory.stat")))
    return available


def _from_meminfo(path: Path) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise OSError(f"{path} has no MemAvailable line")


def _number(path: Path) -> int | None:
    """The number in a file of the control group; None for `max` and where there is no such file."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_cache(path: Path) -> int:
    """Bytes of file cache that the control group is charged for and gives up when asked."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
