"""A compile that was killed while it looked for codes goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from llmc.compiler.driver import compile_model
from llmc.passes.quantize import solve

TEXT = "Once upon a time there was a dog. The dog liked to run and play in the big green park with Tom. " * 40
SAVED = 3
KILLED = f"""
import os, signal, sys
from llmc.compiler.driver import compile_model
from llmc.passes.quantize import solve

save, count = solve.SolvedFolder.save, [0]

def dies(*arguments):
    save(*arguments)
    count[0] += 1
    if count[0] == {SAVED}:
        os.kill(os.getpid(), signal.SIGKILL)

solve.SolvedFolder.save = dies
compile_model(sys.argv[1], output=sys.argv[2], calibration=sys.argv[3], quant="int4", target="reference",
              verify="off", cache=False)
"""


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_compile_goes_on_and_gives_the_same_bytes(stories_1m, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {
        "quant": "int4",
        "calibration": text,
        "target": "reference",
        "verify": "off",
        "cache": False,
    }
    (tmp_path / "whole").mkdir()
    whole = compile_model(stories_1m, output=tmp_path / "whole" / "out.llmc", **options)
    cut = tmp_path / "cut"
    cut.mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(stories_1m), str(cut / "out.llmc"), str(text)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cut / "out.llmc").exists()
    assert len(list(cut.rglob("segment-*.safetensors"))) == SAVED
    saved = []
    save = solve.SolvedFolder.save

    def counted(folder, segment, results):
        saved.append(segment)
        save(folder, segment, results)

    monkeypatch.setattr(solve.SolvedFolder, "save", counted)
    resumed = compile_model(stories_1m, output=cut / "out.llmc", **options)
    assert saved
    assert min(saved) >= SAVED
    assert contents(resumed.path) == contents(whole.path)
    assert [path.name for path in cut.iterdir()] == ["out.llmc"]
