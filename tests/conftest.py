"""Options and fixtures of all tests: golden texts, what is bundled, hypothesis on a noisy machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Triton reads it when first imported, by whichever test; kernels are compiled in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]

# A planted fault is not seen in the source that keys are made of: tests of the compile cache turn it on.
os.environ["LLMC_CACHE_BYTES"] = "0"

# A deadline would fail a test for what its neighbours on the machine do.
settings.register_profile("llmc", deadline=None, print_blob=True)
settings.load_profile("llmc")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing")


@pytest.fixture
def golden(request):
    """`golden(text, "name.txt")` compares `text` with golden/name.txt beside the test file.

    With --update-golden it writes that file instead.
    """
    folder = request.path.parent / "golden"
    update = request.config.getoption("--update-golden")

    def check(text, name):
        path = folder / name
        if update:
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing: run with --update-golden, then read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(scope="session")
def stories_7m() -> Path:
    """The folder of the bundled model."""
    return REPOSITORY / "models" / "stories-7m"


@pytest.fixture(scope="session")
def stories_1m() -> Path:
    """The folder of the bundled draft."""
    return REPOSITORY / "models" / "stories-1m"


@pytest.fixture(scope="session")
def heldout_stories() -> list[str]:
    """Stories that the bundled models were not trained on."""
    text = (REPOSITORY / "tests" / "data" / "stories-heldout.txt").read_text(encoding="utf-8")
    return [story.strip("\n") for story in text.split("<|endoftext|>") if story.strip()]
