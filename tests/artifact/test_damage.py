"""Every kind of damage is found, and named by file and chunk."""

from __future__ import annotations

import pytest

from llmc.artifact import checksums
from llmc.artifact.checksums import ChunkHasher, check_contents, check_presence
from llmc.artifact.reader import open_artifact, open_unchecked, verify_artifact
from llmc.artifact.schema import FileEntry
from llmc.artifact.summary import summarise
from llmc.spec.errors import ArtifactError

pytestmark = pytest.mark.pure

FILES = ["program.json", "report.json", "tokenizer/tokenizer.json", "weights-00001.safetensors"]


def flip(path, index=-1):
    data = bytearray(path.read_bytes())
    data[index] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_names_file_and_chunk(made, name):
    flip(made.path / name)
    with pytest.raises(ArtifactError, match=rf"{name} is damaged in chunk 0"):
        open_artifact(made.path)
    (problem,) = verify_artifact(made.path)
    assert problem.file == name


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_before_anything_is_read(made, name):
    (made.path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_unchecked(made.path)
    assert [str(problem) for problem in verify_artifact(made.path)] == [f"{name} is missing"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(made, name):
    path = made.path / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has {size - 1} bytes instead of {size}"):
        open_unchecked(made.path)


def test_every_problem_is_listed(made):
    (made.path / "report.json").unlink()
    flip(made.path / "program.json")
    (made.path / "kernels").mkdir()
    (made.path / "kernels" / "evil.so").write_bytes(b"x")
    flip(made.path / "weights-00001.safetensors", 100)
    problems = verify_artifact(made.path)
    assert sorted(problem.file for problem in problems) == [
        "kernels/evil.so",
        "program.json",
        "report.json",
        "weights-00001.safetensors",
    ]


def test_a_damaged_manifest_is_a_problem(made):
    flip(made.path / "manifest.json", 300)
    (problem,) = verify_artifact(made.path)
    assert problem.file == "manifest.json"
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(made.path)


def test_the_count_of_further_problems_is_told(made):
    for name in FILES:
        flip(made.path / name)
    with pytest.raises(ArtifactError, match="3 more problems"):
        open_artifact(made.path)


def test_what_is_no_artifact_is_said(tmp_path, stories_1m):
    with pytest.raises(ArtifactError, match="Nothing exists"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="must be compiled first"):
        open_artifact(stories_1m)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        verify_artifact(stories_1m)


def test_a_file_that_is_not_listed_is_not_read(made):
    (made.path / "extra.json").write_text("{}")
    assert made.has("report.json")
    assert not made.has("extra.json")
    with pytest.raises(ArtifactError, match=r"no file 'extra\.json'"):
        made.read_bytes("extra.json")


def entry_of(path, data):
    hasher = ChunkHasher()
    hasher.update(data)
    return FileEntry(path=path, kind="weights", size_bytes=len(data), chunks=hasher.finish())


def test_damage_is_found_in_the_chunk_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(checksums, "_READ_BYTES", 300)
    data = bytes(range(256)) * 17
    (tmp_path / "w").write_bytes(data)
    entry = entry_of("w", data)
    assert len(entry.chunks) == 5
    assert check_contents(tmp_path, [entry]) == []
    flip(tmp_path / "w", 2500)
    flip(tmp_path / "w", 4351)
    found = check_contents(tmp_path, [entry], num_threads=3)
    assert [str(problem) for problem in found] == [
        "w is damaged in chunk 2 (bytes 2000 to 2999): it does not match its checksum",
        "w is damaged in chunk 4 (bytes 4000 to 4351): it does not match its checksum",
    ]


def test_chunks_do_not_depend_on_how_bytes_arrive(monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 10)
    data = bytes(range(97))
    whole, pieces = ChunkHasher(), ChunkHasher()
    whole.update(data)
    for start in range(0, 97, 7):
        pieces.update(memoryview(data)[start : start + 7])
    digests = whole.finish()
    assert pieces.finish() == digests
    assert len(digests) == 10


def test_an_empty_file_has_no_chunks(tmp_path):
    (tmp_path / "e").write_bytes(b"")
    entry = entry_of("e", b"")
    assert entry.chunks == ()
    assert check_presence(tmp_path, [entry]) == []
    assert check_contents(tmp_path, [entry]) == []


def test_a_chunk_without_a_digest_is_a_problem(tmp_path):
    (tmp_path / "e").write_bytes(b"abc")
    entry = FileEntry(path="e", kind="weights", size_bytes=3, chunks=())
    assert "checksum for each" in str(check_presence(tmp_path, [entry])[0])


def test_the_summary_adds_up(made, artifacts):
    summary = summarise(open_artifact(made.path))
    assert summary.size_bytes == sum(len(data) for data in artifacts.contents(made.path).values())
    assert sum(summary.size_by_kind.values()) == made.size_bytes
    by_dtype = {group.dtype: (group.num_tensors, group.num_elements) for group in summary.weights}
    assert by_dtype == {"bfloat16": (1, 15), "float32": (1, 1), "uint8": (1, 63), "float16": (1, 0)}
    assert summary.bits_per_weight == 8 * (30 + 4 + 63) / 79
    told = summary.as_dict()
    assert told["recipe"]["name"] == "int4"
    assert told["history"][0]["decisions"][0]["choice"] == "int4"
    assert told["memory"]["weight_bytes"] == 10
