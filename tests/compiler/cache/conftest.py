"""A compile cache of a test's own, and what a folder holds."""

from __future__ import annotations

import pytest


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """The cache on, in a folder of the test."""
    monkeypatch.setenv("LLMC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMC_CACHE_BYTES")
    return tmp_path / "cache"


@pytest.fixture
def contents():
    """`contents(folder)` gives the bytes of all files in a folder by their paths in it."""

    def read(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
