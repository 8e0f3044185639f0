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
from llmc.compiler.estimate import answer_fit
from llmc.compiler.layer_trace import trace_layers
from llmc.ir.weights import Constant
from llmc.spec.errors import UsageError

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


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


@pytest.fixture
def config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def test_a_large_model_is_measured_by_one_layer(config_only):
    found = answer_fit(config_only, memory_bytes=160 << 30, context=8192)
    assert found.estimate.num_parameters == 70_553_706_496
    assert found.estimate.weight_bytes == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    assert found.estimate.request_bytes(8192) == 8192 * 80 * 2 * 8 * 128 * 2
    assert found.requests == (160 * 2**30 - found.estimate.weight_bytes) // found.estimate.request_bytes(8192)
    assert found.ways == ()


@pytest.mark.slow
def test_what_does_not_fit_gets_three_ways_that_do(config_only):
    found = answer_fit(config_only, memory_bytes=80 << 30, context=131072)
    assert found.requests == 0
    assert len(found.ways) == 3
    assert any("--quant" in way for way in found.ways)
    with pytest.raises(UsageError, match="200000 tokens was asked for"):
        answer_fit(config_only, memory_bytes=80 << 30, context=200_000)


def test_an_estimate_is_what_a_compile_finds(stories_7m):
    found = answer_fit(stories_7m, memory_bytes=1 << 30, quant="int8")
    dry = compile_model(stories_7m, quant="int8", target="reference", dry_run=True)
    assert found.estimate.num_parameters == 7_344_384
    assert found.estimate.weight_bytes == dry.fit.weight_bytes
    assert found.estimate.activation_bytes == pytest.approx(dry.fit.activation_bytes, rel=0.01)
    assert found.estimate.request_bytes(512) == 512 * dry.fit.cache_bytes_per_token


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
    assert next(entry for entry in told["choices"] if entry["name"] == "rtn")["counts"] == {"int8_g32": 9}


def test_the_picture_folds_layers_and_is_xml(artifacts, tmp_path):
    assert inspect(artifacts["one"], "--svg", tmp_path / "p.svg").exit_code == 0
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


def test_a_prompt_of_one_token_cannot_be_traced(artifacts):
    result = inspect(artifacts["one"], "--trace", "--prompt", "")
    assert result.exit_code == 2
    assert "fewer than two tokens" in result.output
