"""What is shipped: one package, nothing beside it, and none of its folders forgotten."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.pure

NOT_SHIPPED = {"tests", "bench", "docs", "examples", "build", "dist"}


def is_hidden(path):
    return any(part.startswith((".", "__pycache__")) or part.endswith(".egg-info") for part in path.parts)


def test_every_folder_with_python_files_is_in_the_package_list(repository, packages):
    folders = {path.parent.relative_to(repository) for path in repository.glob("*/**/*.py")}
    shipped = {
        ".".join(["llmc", *folder.parts])
        for folder in folders
        if not is_hidden(folder)
        and folder.parts[0] not in NOT_SHIPPED
        and not folder.parts[0].endswith(".llmc")
    }
    assert shipped | {"llmc"} == set(packages)


def test_every_package_has_an_init_file(repository, packages):
    missing = [
        package
        for package in packages
        if not repository.joinpath(*package.split(".")[1:], "__init__.py").exists()
    ]
    assert not missing


@pytest.fixture(scope="module")
def wheel_entries(repository, packages, tmp_path_factory):
    """The names in a wheel built offline from a copy of what is shipped."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed", "__init__.py"):
        shutil.copy(repository / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.llmc")
    for room in {package.split(".")[1] for package in packages if "." in package}:
        shutil.copytree(repository / room, copy / room, ignore=ignore)
    for room in ("tests", "bench"):  # they lie beside the package and must not slip in
        (copy / room).mkdir()
        (copy / room / "__init__.py").touch()
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(copy / "out"),
            str(copy),
        ],
        cwd=copy.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "out").glob("*.whl")
    assert wheel.name.startswith("llmc_compiler-")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_and_its_metadata_only(wheel_entries):
    top = {entry.partition("/")[0] for entry in wheel_entries}
    assert len(top) == 2
    assert "llmc" in top
    assert (top - {"llmc"}).pop().endswith(".dist-info")


def test_the_wheel_holds_every_module_and_kernel_source(wheel_entries, repository, sources):
    expected = {f"llmc/{source.name}" for source in sources} | {"llmc/py.typed"}
    expected |= {f"llmc/{path.relative_to(repository)}" for path in repository.glob("kernels/cpu/*.hpp")}
    assert expected <= set(wheel_entries)


def test_the_wheel_holds_no_weights_tests_or_caches(wheel_entries):
    unwanted = [
        e
        for e in wheel_entries
        if e.endswith((".safetensors", ".pyc")) or e.startswith(("llmc/tests/", "llmc/bench/"))
    ]
    assert not unwanted
