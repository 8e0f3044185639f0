"""From process start to `/ready` over an artifact of the CPU target: wall clock as a parent sees it,
processor time, and the ledger. Bars: 1.0 s, and a ledger within 5 % of the wall clock."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Record

BAR_READY_S = 1.0
BAR_GAP = 0.05


def start_once(artifact: str) -> dict[str, object]:
    """One server, from nothing to ready and down again."""
    command = [sys.executable, "-m", "llmc.cli", "serve", artifact, "--port", "0", "--json"]
    started_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            wall_s = time.perf_counter() - started_s
            stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        finally:
            process.kill()
    return {
        "ready_s": wall_s,
        "cpu_s": (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
        "ledger_gap": abs(sum(ready["ledger"].values()) / wall_s - 1),
        "ledger": ready["ledger"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", help="One of the target cpu.")
    parser.add_argument("--starts", type=int, default=9)
    arguments = parser.parse_args()
    record = Record("serve_start")
    starts = sorted(
        (start_once(arguments.artifact) for _ in range(arguments.starts)), key=lambda each: each["ready_s"]
    )
    middle = starts[len(starts) // 2]
    results = {
        "bar_ready_s": BAR_READY_S,
        "bar_ledger_gap": BAR_GAP,
        **middle,
        "ledger_gap_most": max(each["ledger_gap"] for each in starts),
        "ready_s_each": [each["ready_s"] for each in starts],
        "cpu_s_each": [each["cpu_s"] for each in starts],
    }
    record.write(results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
