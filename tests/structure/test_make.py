"""The commands that the README and CI rely on."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.pure, pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")]


def dry_run(repository, *targets):
    """The commands that make would run, once the environment stands."""
    result = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.complete", *targets],
        cwd=repository,
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if "pytest" in line or "llmc " in line]


def test_test_leaves_out_the_slow_ones(repository):
    (command,) = dry_run(repository, "test")
    assert '-m "not slow"' in command


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts the cores that Linux allows")
def test_one_process_runs_tests_on_each_core(repository, monkeypatch):
    """However few threads libraries are told to use."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WORKERS", raising=False)
    (command,) = dry_run(repository, "test")
    assert f"-n {len(os.sched_getaffinity(0))} " in command


def test_test_full_alone_runs_everything(repository):
    (command,) = dry_run(repository, "test-full")
    assert "-m" not in command.split()


def test_test_and_test_full_together_run_each_test_once(repository):
    first, second = dry_run(repository, "lint", "typecheck", "test", "test-full")
    assert '-m "not slow"' in first
    assert second.rstrip().endswith("-m slow")


def test_the_demo_compiles_and_generates_from_the_bundled_model(repository):
    compile_command, generate_command = dry_run(repository, "demo")
    assert "compile models/stories-7m" in compile_command
    assert "generate" in generate_command


def test_make_venv_refuses_an_old_or_missing_interpreter(repository, tmp_path):
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    script = repository / ".ci" / "make-venv"
    for interpreter in (old, tmp_path / "absent"):
        result = subprocess.run(
            ["bash", script, tmp_path / "venv", interpreter], capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert "needs Python 3.11 or newer" in result.stderr
        assert not (tmp_path / "venv").exists()


def test_ci_runs_lint_types_and_all_tests(repository):
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert "make lint typecheck test test-full" in script
    assert os.access(repository / ".ci" / "run", os.X_OK)
