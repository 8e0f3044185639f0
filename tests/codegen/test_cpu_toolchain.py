"""Compilers that are missing, broken or out of room end in an error that says so, and leave nothing."""

from __future__ import annotations

import shutil
import tempfile

import pytest

from llmc.artifact.cpu import CPU_SOURCE
from llmc.codegen.cpu.toolchain import Compiler, compile_library, find_compiler
from llmc.compiler.driver import compile_model
from llmc.kernels.levels import GENERIC
from llmc.spec.errors import TargetError

pytestmark = pytest.mark.cpu
SOURCE = "int answer() { return 42; }\n"


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_compiler_offers_the_target_that_needs_none(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"no C\+\+ compiler") as caught:
        find_compiler()
    assert "--target reference" in caught.value.fix
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(TargetError, match="from CXX"):
        find_compiler()


def test_no_compiler_leaves_no_artifact(monkeypatch, tmp_path, stories_1m):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(TargetError, match=r"C\+\+ compiler"):
        compile_model(stories_1m, output=tmp_path / "out.llmc", target="cpu", quant="int8", verify="off")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'model.cpp:1: error: out of ideas' >&2; exit 1", "out of ideas"),
        ("exit 0", "refused"),  # claims success, writes nothing
        ("kill -9 $$", "refused"),
    ],
)
def test_a_broken_compiler_is_named_with_its_complaint(monkeypatch, tmp_path, text, said):
    broken = script(tmp_path, "c++", text)
    files = tmp_path / "tmp"
    files.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    with pytest.raises(TargetError, match=said) as caught:
        compile_library(Compiler(str(broken), "Broken C++ 1.0"), SOURCE, GENERIC)
    assert "Broken C++ 1.0" in str(caught.value)
    assert "CXX" in caught.value.fix
    assert list(files.iterdir()) == []


def test_a_file_that_is_no_program_is_a_refusal(tmp_path):
    path = tmp_path / "c++"
    path.write_bytes(b"\x00\x01not a program")
    path.chmod(0o755)
    with pytest.raises(TargetError, match="refused"):
        compile_library(Compiler(str(path), ""), SOURCE, GENERIC)


def test_no_room_for_temporary_files_is_an_error_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(TargetError, match="could not be written") as caught:
        compile_library(Compiler("/usr/bin/c++", "C++"), SOURCE, GENERIC)
    assert "TMPDIR" in caught.value.fix


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_library_names_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = compile_library(find_compiler(), SOURCE + "const char* here() { return __FILE__; }\n", GENERIC)
    assert str(tmp_path).encode() not in library
    assert CPU_SOURCE.rpartition("/")[2].encode() in library
