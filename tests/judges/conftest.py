"""Judges from outside: programs that others wrote, against a server on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmc

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)
HELDOUT = Path(__file__).resolve().parents[1] / "data" / "stories-heldout.txt"


@pytest.fixture(scope="session")
def judged(stories_1m, tmp_path_factory):
    """The smallest bundled model, compiled for the reference target."""
    path = tmp_path_factory.mktemp("judged") / "stories.llmc"
    llmc.compile(str(stories_1m), output=str(path), target="reference", verify="off")
    return path


@pytest.fixture(scope="session")
def chatty(stories_1m, tmp_path_factory):
    """The same model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copytree(stories_1m, folder / "model")
    settings = folder / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    llmc.compile(str(folder / "model"), output=str(folder / "stories.llmc"), target="reference", verify="off")
    return folder / "stories.llmc"


@pytest.fixture(scope="session")
def stories():
    """A dozen held-out stories, each well within the model's context."""
    texts = [text.strip() for text in HELDOUT.read_text(encoding="utf-8").split("<|endoftext|>")]
    return [text for text in texts if 100 < len(text) < 900][:12]


@contextlib.contextmanager
def served(artifact, *options):
    """(URL, process) of `llmc serve`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc.cli", "serve", str(artifact), "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield json.loads(process.stdout.readline())["url"], process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def server(judged):
    with served(judged) as (url, _):
        yield url


@pytest.fixture(scope="module")
def serve_artifact():
    """A function that serves an artifact until the module's tests are done."""
    with contextlib.ExitStack() as stack:
        yield lambda artifact, *options: stack.enter_context(served(artifact, *options))


@pytest.fixture
def serve_judged(judged):
    """A function that starts a server of its own over the judged artifact."""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(served(judged, *options))


@pytest.fixture
def judge_program():
    """A function from a program's name to its path: beside this Python, or on PATH. Skips without it."""

    def find(name, package):
        beside = Path(sys.executable).with_name(name)
        found = str(beside) if beside.is_file() else shutil.which(name)
        if found is None:
            pytest.skip(
                f"{name} is not installed: `pip install '{package}'`, maybe in an environment on PATH"
            )
        return found

    return find
