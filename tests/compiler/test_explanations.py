"""What `llmc inspect` answers beyond facts: fit from a config alone, reasons, changes, traces, pictures."""

from __future__ import annotations

import json
import xml.dom.minidom

import pytest
import torch
from click.testing import CliRunner

from llmc.artifact.reader import open_artifact
from llmc.cli.main import main
from llmc.compiler.compare.quality import portable_program
from llmc.compiler.driver import compile_model
from llmc.compiler.layer_trace import trace_layers
from llmc.ir.weights import Constant


@pytest.fixture(scope="module")
def artifacts(stories_1m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    made = {}
    for name, options in (("one", {}), ("two", {"overrides": ["kv_layout.page_tokens=16"]})):
        made[name] = folder / f"{name}.llmc"
        compile_model(
            stories_1m, output=made[name], quant="int8", target="reference", verify="off", **options
        )
    return made


def inspect(*arguments):
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_changes_name_the_input_and_nothing_else(artifacts):
    told = json.loads(inspect(artifacts["one"], "--against", artifacts["two"], "--json").output)
    assert told["changes"] == [{"what": "kv_layout.page_tokens", "here": "0", "there": "16"}]
    same = inspect(artifacts["one"], "--against", artifacts["one"])
    assert "Both were made of the same inputs." in same.output


def test_reasons_count_fusions_and_choices(artifacts):
    told = json.loads(inspect(artifacts["one"], "--why", "--json").output)
    assert {"name": "fuse_qkv", "matches": 2, "misses": []} in told["fusions"]
    assert next(entry for entry in told["choices"] if entry["name"] == "scale_search")["counts"] == {
        "int8_g32": 9
    }


def test_artifacts_of_the_same_inputs_have_one_key(artifacts):
    keys = {name: json.loads(inspect(path, "--why", "--json").output) for name, path in artifacts.items()}
    assert len({told["inputs_key"] for told in keys.values()}) == 2
    told = json.loads(inspect(artifacts["one"], "--against", artifacts["two"], "--json").output)
    assert told["inputs_keys"] == {f"{name}.llmc": found["inputs_key"] for name, found in keys.items()}


def test_the_bytes_of_weights_are_all_accounted_for(artifacts):
    told = json.loads(inspect(artifacts["one"], "--bytes", "--json").output)
    parts = {share["part"]: share["size_bytes"] for share in told["weights"]}
    artifact = open_artifact(artifacts["one"])
    assert sum(parts.values()) == sum(view.data.nbytes for view in artifact.weights().values())
    assert {"embed_tokens", "layers: mlp", "layers: self_attn"} <= set(parts)
    assert told["memory"]["weight_bytes"] == artifact.manifest.memory.weight_bytes


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--why", "--graph"), "--graph and --why were asked at once"),
        (("--quant", "int4"), "--quant was given without --fit"),
        (("--prompt", "hello"), "--prompt was given without --trace"),
        (("--fit", "--target", "cpu"), "--target was given for an artifact"),
        (("--graph", "-o", "/nowhere/at/all.svg"), "cannot be written"),
    ],
)
def test_questions_that_cannot_be_answered_together_are_refused(artifacts, arguments, fragment):
    result = inspect(artifacts["one"], *arguments)
    assert result.exit_code == 2
    assert fragment in result.output


def test_only_artifacts_are_explained(stories_1m):
    result = inspect(stories_1m, "--why")
    assert result.exit_code == 2
    assert "--why was asked about" in result.output


def test_the_picture_folds_layers_and_is_xml(artifacts, tmp_path):
    assert inspect(artifacts["one"], "--graph", "-o", tmp_path / "p.svg").exit_code == 0
    text = (tmp_path / "p.svg").read_text()
    xml.dom.minidom.parseString(text)
    assert "llmc.quantized_linear int8_g32" in text


def test_a_trace_tells_a_pass_from_a_kernel(artifacts):
    artifact = open_artifact(artifacts["one"])
    prompts = [tuple(range(5, 25))]
    sound = trace_layers(
        artifact, prompts, reference=portable_program(artifact), reference_name="portable", bound=1e-3
    )
    assert sound.first is None
    assert sound.code_error < 1e-6
    spoilt = portable_program(artifact)
    name = next(name for name in spoilt.used_weights() if "layers.1." in name and name.endswith("scales"))
    values = spoilt.weights.evaluate(name)
    weights = spoilt.weights.with_entries({name: Constant((values * 1.5).to(torch.float16))})
    found = trace_layers(
        artifact,
        prompts,
        reference=spoilt.replace(weights=weights),
        reference_name="another",
        bound=1e-3,
    )
    assert found.first.layer == "layer 1"
    assert "first leaves another at layer 1" in found.verdict()


@pytest.mark.parametrize("bound", ["nan", "0", "-1", "inf"])
def test_a_bound_that_is_none_is_refused(artifacts, bound):
    result = inspect(artifacts["one"], "--trace", "--prompt", "a b c", "--bound", bound)
    assert result.exit_code == 2
    assert "a number above 0" in result.output


@pytest.mark.slow
def test_another_model_is_no_reference(artifacts, stories_7m):
    result = inspect(artifacts["one"], "--trace", "--prompt", "a b c", "--reference", stories_7m)
    assert result.exit_code == 2
    assert "They differ in num layers: 2 and 8" in result.output


def test_a_prompt_of_one_token_cannot_be_traced(artifacts):
    result = inspect(artifacts["one"], "--trace", "--prompt", "")
    assert result.exit_code == 2
    assert "fewer than two tokens" in result.output
