"""The GPU bench without a GPU: it says so, and its parts run through interpreter and stub driver, with no
library but those of the machines that it is for, and nothing of this tree installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parents[2] / "bench" / "cuda"
# Takes away what an installation of the tree brings, and libraries that GPU machines lack.
_BARE = """
import sys
from importlib.machinery import PathFinder

LACKING = {"llmc", "msgspec", "starlette", "uvicorn", "llguidance", "optuna", "openai", "schemathesis"}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        is_installed = spec is not None and "site-packages" in str(spec.origin)
        return None if name in LACKING and is_installed else spec


kept = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", str(f))]
sys.meta_path[:] = [Bare if f is PathFinder else f for f in kept]
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
"""


def run(tmp_path, *arguments):
    """The command in a process that has but the libraries of a GPU machine; what it printed."""
    bare = tmp_path / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "sitecustomize.py").write_text(_BARE)
    environment = {**os.environ, "PYTHONPATH": str(bare)}
    command = [sys.executable, str(BENCH / "first_run.py"), "--out", str(tmp_path / "out"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)


def found(tmp_path, name):
    return json.loads((tmp_path / "out" / "rehearsal" / f"{name}.json").read_text())["found"]


def test_without_a_gpu_it_says_what_can_be_run_instead(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path)
    assert done.returncode == 3
    assert "pytest tests/kernels/cuda" in done.stdout


def test_it_resumes_and_judges_without_an_installation(tmp_path):
    """Parts that take a moment: what is imported, found, written and skipped."""
    parts = ["limits", "products bf16"]
    first = run(tmp_path, "--dry-run", "--only", *parts)
    assert first.returncode == 0, first.stdout + first.stderr
    assert found(tmp_path, "limits")["copy_gb_s"] > 0
    bars = found(tmp_path, "bars")
    assert bars["price of batch invariance, products of 64 rows"]["value"] > 0
    assert "missing" in bars["decode b1 8B bf16, of 4.8 TB/s"]
    again = run(tmp_path, "--dry-run", "--only", *parts)
    assert again.returncode == 0
    assert "products bf16 (" not in again.stdout
    assert "no parts named nothing" in run(tmp_path, "--dry-run", "--only", "nothing").stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_ends(tmp_path):
    done = run(tmp_path, "--dry-run", "--seconds", "1700")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert found(tmp_path, "tokens_int4_g128")["same"]["oracle sampled"]
    assert found(tmp_path, "artifact")["kernels_loaded"] > 10
    assert found(tmp_path, "driver")["driver_calls"] == 3
