"""The page on the artifact's layout names every file and every key that there is, and its code runs."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase

import pytest

from llmc.compiler.driver import compile_model


@pytest.fixture(scope="module")
def page(request):
    return (request.config.rootpath / "docs" / "how-an-artifact-is-laid-out.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def artifact(stories_1m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("laid-out")
    made = compile_model(
        stories_1m,
        output=folder / "stories-7m-int4.llmc",
        quant="int4-fast",
        target="reference",
        verify="off",
    )
    return made.path


def named(page, heading):
    """What stands in backticks in the first column of the table under a heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_file_is_named(page, artifact):
    patterns = named(page, "The files")
    files = [str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert any(fnmatchcase(file, pattern) for pattern in patterns), file
    everywhere = [
        pattern for pattern in patterns if not pattern.startswith("kernels/") and "onnx" not in pattern
    ]
    for pattern in set(everywhere) - {"genai_config.json"}:
        assert any(fnmatchcase(file, pattern) for file in files), pattern


def test_every_key_of_the_manifest_is_named(page, artifact):
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    assert set(named(page, "The manifest")) == set(manifest)


def test_the_code_runs_as_it_stands(page, artifact, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(artifact.parent)
    exec(compile(code, "page", "exec"), {})
    assert "llama int4-fast" in capsys.readouterr().out
