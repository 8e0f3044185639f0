"""`llmc serve` with a draft model and with a file of several real artifacts: the same tokens, answers by
alias and fallback, and drafts refused that mean something else by a token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from click.testing import CliRunner

import llmc
from llmc.cli.main import main
from llmc.runtime.draft_loading import check_vocabulary
from llmc.runtime.params import SamplingParams
from llmc.spec.errors import UsageError

PROMPT = "Once upon a time"
FILE = """
port: 0
models:
  - artifact: {small}
    name: drafted
    draft: {small}
    aliases: [default, gpt]
    max_model_len: 64
    fallback: plain
  - artifact: {small}
    name: plain
"""


@pytest.fixture(scope="module")
def artifact(stories_1m, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "stories.llmc"
    llmc.compile(str(stories_1m), output=str(path), target="reference", verify="off")
    return path


@pytest.fixture(scope="module")
def stranger(stories_1m, tmp_path_factory):
    """The same model with two tokens that have changed places, and what they are."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(stories_1m, folder / "model")
    file = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {index: token for token, index in vocabulary.items()}
    first, second = by_id[70], by_id[71]
    vocabulary[first], vocabulary[second] = 71, 70
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = folder / "stranger.llmc"
    llmc.compile(str(folder / "model"), output=str(path), target="reference", verify="off")
    return path, first, second


@pytest.mark.slow
def test_a_draft_that_means_something_else_is_refused(artifact, stranger):
    path, first, second = stranger
    got = CliRunner().invoke(main, ["serve", str(artifact), "--draft", str(path), "--port", "0"])
    assert got.exit_code == 2, got.output
    assert "stranger.llmc cannot draft for stories.llmc: their vocabularies differ" in got.stderr
    assert f"Token 70 is {first!r} and {second!r}" in " ".join(got.stderr.split())
    assert "Use a draft model with the same tokenizer" in got.stderr


def test_vocabularies_of_two_sizes_are_told():
    def model(name, size):
        spec = SimpleNamespace(vocab_size=size)
        return SimpleNamespace(
            path=SimpleNamespace(name=name), manifest=SimpleNamespace(spec=spec, of_kind=lambda kind: ())
        )

    with pytest.raises(UsageError, match="One has 4096 tokens and the other 32000"):
        check_vocabulary(model("a", 4096), model("b", 32000))
    check_vocabulary(model("a", 4096), model("b", 4096))


@pytest.mark.slow
def test_a_file_of_real_artifacts(artifact, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(FILE.format(small=artifact))
    command = [sys.executable, "-m", "llmc.cli", "serve", "--config", str(file), "--json"]
    with (
        llmc.load(artifact) as llm,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            ready = json.loads(process.stdout.readline())
            assert ready["models"] == ["drafted", "plain"]

            def ask(model, **fields):
                asked = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1, "seed": 5, **fields}
                return httpx.post(
                    f"{ready['url']}/v1/completions", json={"model": model, **asked}, timeout=120
                )

            own = llm.generate(PROMPT, SamplingParams(temperature=1.0, seed=5, max_tokens=20))[0]
            for name in ("drafted", "gpt", "default", "plain"):
                got = ask(name).json()
                assert got["choices"][0]["text"] == own.text, name
                assert got["model"] == ("plain" if name == "plain" else "drafted")
            long = ask("default", max_tokens=80, ignore_eos=True).json()
            assert (long["model"], long["usage"]["completion_tokens"]) == ("plain", 80)
            refused = ask("default", max_tokens=5000)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request.max_tokens")
        finally:
            process.terminate()
