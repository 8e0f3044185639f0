"""The soak bench: its judgement of single answers and whole runs, and a minute of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "soak"
CLEAN = {
    "endings": {"answered": 5, "left": 2, "late": 1},
    "rss_growth": 0.01,
    "idle": {"requests": 0, "kv_usage": 0.0},
    "books": {"pages_held": 0, "requests_open": 0, "places_taken": 0, "failed_steps": 0},
}


def module(name):
    spec = importlib.util.spec_from_file_location(f"soak_{name}", FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def soak():
    before = sys.path[:]
    yield module("soak")
    sys.path[:] = before


@pytest.mark.parametrize(
    ("kind", "stream", "answer", "ending"),
    [
        ("whole", False, b'200 OK\r\n\r\n{"finish_reason":"stop"},{"finish_reason":"length"}', "answered"),
        ("whole", False, b'200 OK\r\n\r\n{"finish_reason":"stop"}', "none"),
        ("whole", False, b"200 OK\r\n\r\n", "none"),
        ("stream", True, b'200 OK\r\n\r\n"finish_reason":"stop" "finish_reason":"stop"', "none"),
        (
            "stream",
            True,
            b'200 OK\r\n\r\n"finish_reason":"stop" "finish_reason":"stop" data: [DONE]',
            "answered",
        ),
        ("stream", True, b'200 OK\r\n\r\ndata: {"error":{"code":"engine.failed"}}', "unexpected"),
        ("late", True, b'200 OK\r\n\r\ndata: {"error":{"code":"request.timeout"}}', "late"),
        ("late", False, b"504 x\r\n\r\n{}", "late"),
        ("whole", False, b"500 x\r\n\r\n{}", "unexpected"),
        ("whole", False, b"503 x\r\nRetry-After: 1\r\n\r\n{}", "refused"),
        ("whole", False, b"503 x\r\n\r\n{}", "unexpected"),
        ("wrong", False, b"400 x\r\n\r\n{}", "refused"),
        ("wrong", False, b"200 x\r\n\r\n{}", "unexpected"),
    ],
)
def test_every_answer_is_told_from_one_cut_short(kind, stream, answer, ending):
    found = module("visitors").ending_of(kind, {"n": 2, "stream": stream}, b"HTTP/1.1 " + answer)
    assert found == ending


def test_growth_is_measured_behind_the_warm_up(soak):
    sizes = [(float(second), 1000 + 100 * min(second, 10) + second) for second in range(110)]
    grown = soak.growth_of(sizes, 10.0)
    assert (grown["rss_first_bytes"], grown["rss_last_bytes"]) == (2019.5, 2099.5)
    assert grown["rss_growth"] == pytest.approx(80 / 2019.5)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("endings", {"none": 1}, "1 requests had no ending"),
        ("endings", {"unexpected": 2}, "2 requests ended in no way"),
        ("endings", {"late": 0}, "nothing was answered, left or late"),
        ("idle", {"kv_usage": 0.1}, "still there when idle"),
        ("books", {"pages_held": 3}, "3 pages leaked"),
        ("books", {"places_taken": 1}, "1 places stayed open"),
        ("books", {"failed_steps": 1}, "1 steps failed"),
    ],
)
def test_every_missed_bar_is_told(soak, part, change, words):
    assert soak.failures_of(CLEAN) == []
    assert any(words in each for each in soak.failures_of({**CLEAN, part: {**CLEAN[part], **change}}))
    assert soak.failures_of({**CLEAN, "rss_growth": 0.03}) == ["memory grew by 3.0%"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_of_it_meets_every_bar():
    command = [sys.executable, str(FOLDER / "soak.py"), "--seconds", "60", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    results = json.loads(done.stdout)
    assert results["failures"] == [], json.dumps(results, indent=2)
    assert done.returncode == 0
    assert results["visits"] > 300
    assert results["books"]["preemptions"] > 0
    assert results["books"]["drafted"] > 0
    assert results["books"]["response_hits"] > 0
