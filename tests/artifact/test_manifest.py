"""The manifest's bytes: round trip, signature, schema versions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.artifact.schema import FileEntry, decode_manifest, encode_manifest, is_inside
from llmc.spec.errors import ArtifactError

pytestmark = pytest.mark.pure


def resigned(artifacts, **changes):
    """A manifest's bytes with some top-level values changed, signed anew by its own encoder's rule."""
    import hashlib

    document = json.loads(encode_manifest(artifacts.manifest()))
    document |= {"checksum": "0" * 64} | changes
    text = json.dumps(document).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def test_manifests_survive_the_round_trip(artifacts):
    manifest = artifacts.manifest(
        files=(FileEntry(path="a/b.json", kind="report", size_bytes=3, chunks=("ff",)),)
    )
    data = encode_manifest(manifest)
    decoded = decode_manifest(data)
    assert decoded.history == manifest.history
    assert decoded.spec == manifest.spec
    assert decoded.files == manifest.files
    assert decoded.memory == manifest.memory
    assert encode_manifest(decoded) == data


def test_the_bytes_do_not_depend_on_the_order_of_dictionaries(artifacts):
    provenance = artifacts.manifest().provenance
    forward = type(provenance)(model="m", llmc_version="1", tools={"a": "1", "b": "2"})
    backward = type(provenance)(model="m", llmc_version="1", tools={"b": "2", "a": "1"})
    assert encode_manifest(artifacts.manifest(provenance=forward)) == encode_manifest(
        artifacts.manifest(provenance=backward)
    )


def test_a_newer_schema_is_refused_with_both_versions(artifacts):
    with pytest.raises(ArtifactError, match=r"schema version 7.*up to 1") as caught:
        decode_manifest(resigned(artifacts, schema_version=7, recipe="of a form not known yet"))
    assert caught.value.code == "artifact.schema"


def test_every_flipped_bit_is_noticed(artifacts):
    data = encode_manifest(artifacts.manifest())
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << (index % 8)
        with pytest.raises(ArtifactError):
            decode_manifest(bytes(changed))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_an_artifact_error(data):
    with pytest.raises(ArtifactError):
        decode_manifest(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "zip"},
        {"spec": None},
        {"files": [{"path": "../x", "kind": "report", "size_bytes": 0, "chunks": []}]},
    ],
)
def test_a_signed_manifest_that_makes_no_sense_is_refused(artifacts, changes):
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        decode_manifest(resigned(artifacts, **changes))


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\b"])
def test_paths_that_lead_outside_are_recognised(path):
    assert not is_inside(path)


def test_paths_within_are_accepted():
    assert is_inside("tokenizer/tokenizer.json")
