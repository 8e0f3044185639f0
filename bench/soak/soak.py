"""Many clients at a real server for a long time: random requests, timeouts, disconnects. Bars: memory grows
by at most 2 % behind the warm-up, no page stays held, every request has an ending."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Record
from visitors import MEAN_PAUSE_S, Endings, Visitor

BAR_GROWTH = 0.02
NUM_VISITORS = 16
WARM_SHARE = 0.3
WARM_MOST_S = 120.0
SAMPLE_S = 0.25
IDLE_S = 20.0


def resident_bytes(pid: int) -> int:
    """Resident size of a process now."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def soak(
    port: int, vocab_size: int, pid: int, seconds: float, seed: int, pause_s: float
) -> dict[str, Any]:
    """Endings of all visits, and the server's memory over time."""
    endings = Endings()
    stop = asyncio.Event()
    visitors = [
        Visitor(port, vocab_size, seed * NUM_VISITORS + index, endings, pause_s)
        for index in range(NUM_VISITORS)
    ]
    tasks = [asyncio.create_task(each.run(stop)) for each in visitors]
    started = time.monotonic()
    sizes: list[tuple[float, int]] = []
    while (passed_s := time.monotonic() - started) < seconds:
        sizes.append((passed_s, resident_bytes(pid)))
        await asyncio.sleep(SAMPLE_S)
    stop.set()
    await asyncio.gather(*tasks)
    return {
        "visits": sum(endings.counts.values()),
        "endings": dict(sorted(endings.counts.items())),
        "odd": endings.odd,
        **growth_of(sizes, min(WARM_MOST_S, seconds * WARM_SHARE)),
    }


def growth_of(sizes: list[tuple[float, int]], warm_s: float) -> dict[str, float]:
    """Growth of the median size from the first to the last fifth of the samples behind the warm-up."""
    behind = [size for passed_s, size in sizes if passed_s >= warm_s]
    count = max(1, len(behind) // 5)
    first, last = statistics.median(behind[:count]), statistics.median(behind[-count:])
    return {
        "warm_s": warm_s,
        "rss_first_bytes": first,
        "rss_last_bytes": last,
        "rss_growth": last / first - 1,
    }


def wait_until_idle(port: int) -> dict[str, float]:
    """What is still open when everybody has gone: all zero, unless something was lost for good."""
    deadline_s = time.monotonic() + IDLE_S
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status.json", timeout=30) as answer:
            (model,) = json.load(answer)["models"]
        still = {
            "requests": len(model["requests"]),
            "running": model["num_running"],
            "waiting": model["num_waiting"],
            "kv_usage": model["kv_usage"],
        }
        if not any(still.values()) or time.monotonic() > deadline_s:
            return still
        time.sleep(0.1)


def failures_of(results: dict[str, Any]) -> list[str]:
    """The bars that were missed."""
    endings, idle, books = results["endings"], results["idle"], results["books"]
    found = {
        f"memory grew by {results['rss_growth']:.1%}": results["rss_growth"] > BAR_GROWTH,
        f"{endings.get('none', 0)} requests had no ending": endings.get("none", 0),
        f"{endings.get('unexpected', 0)} requests ended in no way they may": endings.get("unexpected", 0),
        f"still there when idle: {idle}": any(idle.values()),
        f"{books['pages_held']} pages leaked": books["pages_held"],
        f"{books['requests_open']} requests and {books['places_taken']} places stayed open": books[
            "requests_open"
        ]
        or books["places_taken"],
        f"{books['failed_steps']} steps failed": books["failed_steps"],
        "nothing was answered, left or late": not all(
            endings.get(name) for name in ("answered", "left", "late")
        ),
    }
    return [what for what, is_missed in found.items() if is_missed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--artifact", help="Serve this one; a simulated model without it.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause", type=float, default=MEAN_PAUSE_S, help="Seconds between two visits of one."
    )
    parser.add_argument("--no-record", action="store_true", help="Print only.")
    arguments = parser.parse_args()
    record = Record("soak")
    command = [sys.executable, str(Path(__file__).with_name("served.py"))]
    command += [arguments.artifact] if arguments.artifact else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            results = asyncio.run(
                soak(
                    *(ready["port"], ready["vocab_size"], process.pid),
                    *(arguments.seconds, arguments.seed, arguments.pause),
                )
            )
            results["idle"] = wait_until_idle(ready["port"])
            process.send_signal(signal.SIGTERM)
            results["books"] = json.loads(process.stdout.readline())
        except BaseException:
            process.kill()
            raise
    results = {
        "seconds": arguments.seconds,
        "clients": NUM_VISITORS,
        "mean_pause_s": arguments.pause,
        "bar_rss_growth": BAR_GROWTH,
        **results,
    }
    results["failures"] = failures_of(results)
    if not arguments.no_record:
        record.write(results)
    print(json.dumps(results, indent=2))
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
