"""The plugin package in examples/ is what the page builds, installs, is found, and works in a compile."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def package(request):
    return request.config.rootpath / "examples" / "llmc-example-pass"


@pytest.fixture(scope="module")
def source(package, tmp_path_factory):
    """A copy: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("source") / package.name
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return shutil.copytree(package, copy, ignore=ignored)


@pytest.fixture(scope="module")
def environment(source, tmp_path_factory):
    """Variables under which the package counts as installed; nothing is downloaded."""
    place = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(place)]
    run([sys.executable, "-m", "pip", "install", *options, str(source)], source, dict(os.environ))
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "PYTHONPATH": str(place), "LLMC_CACHE_DIR": str(cache)}


def run(command, folder, environment):
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def llmc(folder, environment, *arguments):
    return run([sys.executable, "-m", "llmc.cli", *map(str, arguments)], folder, environment)


def test_the_example_is_the_code_of_the_page(request, package):
    page = request.config.rootpath / "docs" / "how-to-add-a-pass.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    outside = code.replace("from ..", "from llmc.").replace("from .", "from llmc.passes.")
    example = (package / "llmc_example_pass" / "drop_unit_scale.py").read_text(encoding="utf-8")
    assert ast.unparse(ast.parse(example)) == ast.unparse(ast.parse(outside)), "but for line breaks"


def test_the_installed_pass_is_listed_with_its_options(environment, tmp_path):
    listed = json.loads(llmc(tmp_path, environment, "passes", "--json"))
    (found,) = [entry for entry in listed["passes"] if entry["name"] == "drop_unit_scale"]
    assert found["stage"] == "canonicalise"
    assert found["contract"] == "exact"
    assert [option["name"] for option in found["options"]] == ["expect"]


def test_the_examples_own_tests_pass(source, environment):
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(source)]
    assert "8 passed" in run([sys.executable, "-m", "pytest", *options, "tests"], source, environment)


def test_a_recipe_with_the_installed_pass_compiles(request, environment, tmp_path):
    recipe = llmc(tmp_path, environment, "recipe", "show", "int8")
    (tmp_path / "my.yaml").write_text(recipe.replace("passes:\n", "passes:\n  - drop_unit_scale\n", 1))
    model = request.config.rootpath / "models" / "stories-1m"
    options = ["--recipe", "my.yaml", "--target", "reference", "-o", "made.llmc", "--json"]
    llmc(tmp_path, environment, "compile", model, *options)
    history = json.loads((tmp_path / "made.llmc" / "manifest.json").read_text())["history"]
    assert "drop_unit_scale" in [record["name"] for record in history]
