"""A compile that cannot succeed says so, by name, and leaves the disk as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmc.compiler.driver as driver
import llmc.compiler.preflight as preflight
from llmc.artifact import folder as artifact_folder
from llmc.compiler.driver import compile_model
from llmc.compiler.ledger import Silent
from llmc.ir.weights import Reader
from llmc.spec.errors import LlmcError, ModelError, RecipeError, TargetError, UsageError


def refusal(kind, model, output, **options):
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        compile_model(model, output=output, **{"verify": "off", "target": "reference"} | options)
    assert sorted(output.parent.iterdir()) == before
    return caught.value


@pytest.mark.parametrize(
    ("options", "kind", "fragments"),
    [
        ({"quant": "int44"}, RecipeError, ["int44", "int4"]),
        ({"overrides": ["kv_layuot.page_tokens=16"]}, RecipeError, ["kv_layuot", "kv_layout"]),
        ({"overrides": ["kv_layout.page_token=16"]}, RecipeError, ["page_token", "page_tokens"]),
        ({"overrides": ["kv_layout.page_tokens=many"]}, RecipeError, ["many"]),
        ({"overrides": ["nonsense"]}, RecipeError, ["nonsense"]),
        ({"target": "refrence"}, TargetError, ["refrence", "reference"]),
        ({"dtype": "float33"}, UsageError, ["float33", "float32"]),
        ({"verify": "numeric"}, UsageError, ["numeric", "numerics"]),
        ({"max_model_len": 0}, UsageError, ["0"]),
        ({"max_model_len": 4096}, ModelError, ["4096", "512"]),
        ({"quant": "int4", "recipe": "my.yaml"}, UsageError, ["--quant", "--recipe"]),
    ],
)
def test_what_does_not_exist_is_named_with_the_closest(stories_1m, tmp_path, options, kind, fragments):
    error = refusal(kind, stories_1m, tmp_path / "out.llmc", **options)
    assert all(fragment in str(error) for fragment in fragments), str(error)


def test_an_existing_output_stays(stories_1m, tmp_path):
    output = tmp_path / "out.llmc"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    assert refusal(UsageError, stories_1m, output).code == "artifact.exists"
    assert refusal(UsageError, stories_1m, output, force=True).code == "artifact.not_an_artifact"
    assert (output / "precious.txt").read_text() == "mine"


def test_an_existing_output_is_found_before_the_model_is_read(tmp_path):
    (tmp_path / "out.llmc").mkdir()
    assert refusal(UsageError, "no/such/model", tmp_path / "out.llmc").code == "artifact.exists"


def test_too_little_disk_is_said_with_both_numbers(stories_1m, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(artifact_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    error = refusal(TargetError, stories_1m, tmp_path / "out.llmc")
    assert error.code == "target.disk_space"
    assert "1000 bytes are free" in error.why


def test_too_little_memory_is_said_before_weights_are_loaded(stories_1m, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "available_memory_bytes", lambda: 1 << 20)
    forbid_loading(monkeypatch)
    error = refusal(TargetError, stories_1m, tmp_path / "out.llmc")
    assert error.code == "target.memory"
    assert f"{1 << 20} bytes are available" in error.why


@pytest.mark.parametrize(
    ("place", "name", "amount", "code"),
    [
        (driver, "available_memory_bytes", 1 << 20, "target.memory"),
        (preflight, "free_disk_bytes", 1000, "target.disk_space"),
    ],
    ids=["memory", "disk"],
)
def test_what_calibration_needs_is_said_before_it_starts(
    stories_1m, tmp_path, monkeypatch, place, name, amount, code
):
    monkeypatch.setattr(place, name, lambda *_: amount)
    monkeypatch.setattr(driver, "MEMORY_BYTES", 1 << 20)
    forbid_loading(monkeypatch)
    error = refusal(TargetError, stories_1m, tmp_path / "out.llmc", quant="int4")
    assert error.code == code
    assert "Calibrating on 8192 tokens" in error.what
    assert f"{amount} bytes are" in error.why


def test_a_recipe_that_does_not_fit_is_refused_before_text_is_prepared(stories_1m, tmp_path, monkeypatch):
    forbid_loading(monkeypatch)
    options = {"quant": "mixed", "overrides": ["mixed_precision.budget=3"]}
    error = refusal(RecipeError, stories_1m, tmp_path / "out.llmc", **options)
    assert error.code == "mixed_precision.budget"


def test_a_cache_that_the_target_cannot_hold_is_refused_before_text_is_prepared(
    stories_1m, tmp_path, monkeypatch
):
    forbid_loading(monkeypatch)
    error = refusal(
        TargetError, stories_1m, tmp_path / "out.llmc", quant="int4", kv_dtype="fp8", target="cpu"
    )
    assert error.code == "cpu.kv_dtype"
    assert "--kv-dtype int8" in error.fix


def forbid_loading(monkeypatch):
    def refuse(self, path, key):
        raise AssertionError(f"{key} was loaded")

    monkeypatch.setattr(Reader, "tensor", refuse)


class Interrupting(Silent):
    """Presses Ctrl-C when a stage begins."""

    def __init__(self, stage):
        self.stage = stage

    def begin(self, stage):
        if stage == self.stage:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "stage", ["trace", "run passes", "write weights", "measure quality", "make the oracle"]
)
def test_an_interrupt_in_any_stage_leaves_nothing(stories_1m, tmp_path, stage):
    with pytest.raises(KeyboardInterrupt):
        compile_model(
            stories_1m,
            output=tmp_path / "out.llmc",
            verify="off",
            target="reference",
            progress=Interrupting(stage),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_replacing_keeps_the_old_artifact(stories_1m, tmp_path):
    output = tmp_path / "out.llmc"
    compile_model(stories_1m, output=output, verify="off", target="reference")
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        compile_model(
            stories_1m,
            output=output,
            verify="off",
            target="reference",
            force=True,
            progress=Interrupting("make the oracle"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.llmc"]
    assert (output / "manifest.json").read_bytes() == before


INTERRUPTED = """
import signal
from llmc.artifact.writer import ArtifactWriter
from llmc.cli.main import main

write = ArtifactWriter.write_tensors

def interrupted(writer, *arguments, **named):
    result = write(writer, *arguments, **named)
    assert any(writer.folder.iterdir())
    signal.raise_signal(signal.SIGINT)
    return result

ArtifactWriter.write_tensors = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job inherits as ignored
main()
"""


def test_ctrl_c_ends_the_command_with_130_and_leaves_nothing(stories_1m, tmp_path):
    options = ["compile", str(stories_1m), "-o", "out.llmc", "--target", "reference", "--verify", "off"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr.splitlines()[-1] == "Interrupted."
    assert list(tmp_path.iterdir()) == []


def test_a_killed_compile_leaves_rubbish_that_the_next_one_removes(stories_1m, tmp_path):
    abandoned = tmp_path / ".out.llmc.partial-abandoned"
    abandoned.mkdir()
    (abandoned / "weights-00001.safetensors").write_bytes(b"half")
    compile_model(stories_1m, output=tmp_path / "out.llmc", verify="off", target="reference")
    assert [path.name for path in tmp_path.iterdir()] == ["out.llmc"]


def test_bad_models_are_refused_through_the_driver_too(stories_1m, tmp_path):
    model = shutil.copytree(stories_1m, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    assert refusal(ModelError, model, tmp_path / "out.llmc").code == "model.no_tokenizer"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(ModelError, empty, tmp_path / "out.llmc").code == "model.empty_folder"
    assert isinstance(refusal(LlmcError, tmp_path / "no" / "model", tmp_path / "out.llmc"), ModelError)


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "fp8"])
def test_a_norm_that_holds_no_number_is_named_whatever_the_recipe(stories_1m, tmp_path, quant):
    """No pass rounds it: it is found as it is read, before any text is written or token looked at."""
    model = shutil.copytree(stories_1m, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = refusal(ModelError, model, tmp_path / "out.llmc", quant=quant)
    assert error.code == "model.not_finite"
    assert "'model.layers.1.input_layernorm.weight' in model.safetensors" in error.what
