"""A fresh environment with the base dependencies alone runs a CPU artifact."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The interpreter of a new environment that holds the base dependencies and this package."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*command, *project["dependencies"]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no packages: {done.stderr.strip().splitlines()[-1]}")
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "llmc").symlink_to(REPOSITORY, target_is_directory=True)
    return python, site


def test_base_dependencies_generate_from_a_cpu_artifact(environment, cpu_artifact):
    python, site = environment
    assert not (site / "torch").exists()
    script = "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('transformers'))"
    subprocess.run([str(python), "-c", script], check=True)
    command = [str(python), "-m", "llmc.cli", "generate", str(cpu_artifact), "--prompt", "Once upon a time"]
    done = subprocess.run([*command, "--max-tokens", "12"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > len("Once upon a time")
    tools = ("pip", "setuptools", "wheel")
    size = sum(
        file.stat().st_size
        for entry in site.iterdir()
        if entry.name.partition("-")[0] not in tools and not entry.is_symlink()
        for file in ([entry] if entry.is_file() else entry.rglob("*"))
        if file.is_file()
    )
    print(f"base dependencies take {size / 2**20:.0f} MiB")
    assert size < 200 * 2**20
