"""An artifact appears whole or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time

import pytest

from llmc.artifact import folder as folder_module
from llmc.artifact.reader import open_artifact, verify_artifact
from llmc.artifact.tensors import TensorSpec
from llmc.artifact.writer import ArtifactWriter
from llmc.spec.errors import InternalError, TargetError, UsageError

pytestmark = pytest.mark.pure


def interrupted(artifacts, path, error, **options):
    """Writes all of an artifact and fails before the commit."""
    with ArtifactWriter(path, **options) as writer:
        artifacts.fill(writer, seed=1)
        raise error


def written_twice(artifacts, path):
    """Another writer finishes the same artifact while this one is at work."""
    with ArtifactWriter(path) as writer:
        artifacts.fill(writer)
        artifacts.make(path, seed=1)
        writer.commit(artifacts.manifest())


def write_also(artifacts, path, name):
    with ArtifactWriter(path) as writer:
        artifacts.fill(writer)
        writer.write_bytes(name, "report", b"")


def left_in(path):
    return sorted(entry.name for entry in path.iterdir())


def test_the_same_content_gives_the_same_bytes(tmp_path, artifacts):
    first, second = artifacts.make(tmp_path / "a.llmc"), artifacts.make(tmp_path / "sub" / "b.llmc")
    assert artifacts.contents(first.path) == artifacts.contents(second.path)
    assert "manifest.json" in artifacts.contents(first.path)
    assert left_in(tmp_path) == ["a.llmc", "sub"]


def test_what_was_written_can_be_opened(made):
    opened = open_artifact(made.path)
    assert opened.manifest.files == made.manifest.files
    assert [entry.path for entry in opened.manifest.files] == sorted(
        entry.path for entry in opened.manifest.files
    )
    assert opened.read_bytes("program.json") == b'{"nodes": []}\n'
    assert set(opened.weights()) == {"embed", "scale", "codes", "none"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_by_an_error(tmp_path, artifacts, error):
    with pytest.raises(error):
        interrupted(artifacts, tmp_path / "x.llmc", error)
    assert left_in(tmp_path) == []


def test_nothing_is_left_behind_by_an_error_within_a_file(tmp_path):
    def fetch(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "x.llmc") as writer:
        writer.write_tensors("w.safetensors", "weights", [TensorSpec("a", "int8", (1,))], fetch)
    assert left_in(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path, artifacts):
    with ArtifactWriter(tmp_path / "x.llmc") as writer:
        artifacts.fill(writer)
    assert left_in(tmp_path) == []


def test_it_does_not_appear_before_commit(tmp_path, artifacts):
    with ArtifactWriter(tmp_path / "x.llmc") as writer:
        artifacts.fill(writer)
        assert not (tmp_path / "x.llmc").exists()
        preview = writer.preview(artifacts.manifest())
        assert preview.read_bytes("report.json") == b"{}"
        writer.commit(artifacts.manifest())
        assert (tmp_path / "x.llmc").exists()


def test_an_existing_output_is_refused_before_anything_is_written(tmp_path, artifacts, made):
    before = artifacts.contents(made.path)
    with pytest.raises(UsageError, match="--force") as caught, ArtifactWriter(made.path):
        pytest.fail("the writer was entered")
    assert caught.value.code == "artifact.exists"
    assert artifacts.contents(made.path) == before


def test_force_replaces_only_once_the_new_one_is_whole(tmp_path, artifacts, made):
    before = artifacts.contents(made.path)
    with pytest.raises(RuntimeError):
        interrupted(artifacts, made.path, RuntimeError, force=True)
    assert artifacts.contents(made.path) == before
    artifacts.make(made.path, seed=1, force=True)
    assert artifacts.contents(made.path) != before
    assert verify_artifact(made.path) == []
    assert left_in(tmp_path) == ["made.llmc"]


def test_force_replaces_nothing_but_artifacts(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no artifact"), ArtifactWriter(tmp_path / "thesis", force=True):
        pytest.fail("the writer was entered")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no artifact"), ArtifactWriter(tmp_path / "file", force=True):
        pytest.fail("the writer was entered")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_one_that_appears_meanwhile_is_not_overwritten(tmp_path, artifacts):
    with pytest.raises(UsageError):
        written_twice(artifacts, tmp_path / "x.llmc")
    other = artifacts.make(tmp_path / "other" / "x.llmc", seed=1)
    assert artifacts.contents(tmp_path / "x.llmc") == artifacts.contents(other.path)
    shutil.rmtree(tmp_path / "other")
    assert left_in(tmp_path) == ["x.llmc"]


def test_the_old_one_comes_back_when_the_exchange_fails(tmp_path, artifacts, made, monkeypatch):
    before = artifacts.contents(made.path)
    rename, calls = folder_module.Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(folder_module.Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        artifacts.make(made.path, seed=1, force=True)
    assert artifacts.contents(made.path) == before
    assert left_in(tmp_path) == ["made.llmc"]


def test_too_little_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=1234))
    writer = ArtifactWriter(tmp_path / "deep" / "x.llmc", needed_bytes=5678)
    with pytest.raises(TargetError, match=r"5678 bytes.*1234 bytes"), writer:
        pytest.fail("the writer was entered")
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_is_a_target_error(tmp_path, artifacts, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TargetError, match="became full"):
        artifacts.make(tmp_path / "x.llmc")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ["manifest.json", "../x", "/x", "program.json"])
def test_file_names_are_checked(tmp_path, artifacts, name):
    with pytest.raises(InternalError, match=name):
        write_also(artifacts, tmp_path / "x.llmc", name)


def test_a_closed_writer_refuses(tmp_path, artifacts):
    with ArtifactWriter(tmp_path / "x.llmc") as writer:
        writer.commit(artifacts.manifest())
        with pytest.raises(InternalError, match="not open"):
            writer.write_bytes("a", "report", b"")


def begin_and_wait(path, begun):
    with ArtifactWriter(path) as writer:
        writer.write_bytes("program.json", "program", b"x" * 1000)
        begun.set()
        time.sleep(60)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, artifacts):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=begin_and_wait, args=(tmp_path / "x.llmc", begun))
    process.start()
    assert begun.wait(30)
    (partial,) = left_in(tmp_path)
    with ArtifactWriter(tmp_path / "x.llmc"):
        assert partial in left_in(tmp_path), "a writer that is alive is left alone"
    process.kill()
    process.join()
    assert left_in(tmp_path) == [partial]
    artifacts.make(tmp_path / "x.llmc")
    assert left_in(tmp_path) == ["x.llmc"]
