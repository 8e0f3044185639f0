"""Will it fit? Answers from config.json alone, against what compiles of the same models find."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmc.artifact.reader import open_artifact
from llmc.cli.main import main
from llmc.codegen.base import backend_for
from llmc.compiler.checkpoint import read_config
from llmc.compiler.driver import compile_model
from llmc.compiler.estimate import Estimator
from llmc.compiler.fitting import Asked, answer_fit, ways_to_fit
from llmc.compiler.hf.adapter import config_as_dict, config_of
from llmc.compiler.trace import trace_config
from llmc.models.families import FAMILIES, family_named
from llmc.passes.base import PassContext, Stage
from llmc.passes.bits import bits_per_weight
from llmc.passes.manager import run_passes, until_stage
from llmc.passes.recipes import override, preset_recipe
from llmc.runtime.fit import fit_within
from llmc.spec.errors import ModelError, UsageError
from llmc.spec.target import parse_target

GIB = 2**30
# What tests and benches ask of models that no machine here could hold.
LARGE = json.loads((Path(__file__).parents[1] / "data" / "large_configs.json").read_text())
LLAMA_70B, QWEN3_235B = LARGE["llama-70b"], LARGE["qwen3-235b"]
CPU = parse_target("cpu")
FAST = ("llama3", "qwen2_moe", "deepseek_v3")
SUPPORTED = [family.name for family in FAMILIES if family.refused is None]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


def folder_of(config, folder):
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def test_a_large_model_is_measured_by_few_layers(tmp_path):
    found = answer_fit(
        folder_of(LLAMA_70B, tmp_path), memory_bytes=160 * GIB, context=8192, target="reference"
    )
    assert found.estimate.num_parameters == 70_553_706_496
    assert found.fit.weight_bytes == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    assert found.fit.request_bytes == 8192 * 80 * 2 * 8 * 128 * 2
    beside = found.fit.weight_bytes + found.fit.activation_bytes
    assert found.fit.requests == (160 * GIB - beside) // found.fit.request_bytes == 11
    assert found.ways == ()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_experts_are_counted_in_every_layer(tmp_path):
    found = answer_fit(
        folder_of(QWEN3_235B, tmp_path), memory_bytes=200 * GIB, context=8192, quant="int4", target="cpu"
    )
    assert found.estimate.num_parameters == 235_093_634_560
    assert found.estimate.num_layers == 94
    assert 4.5 < found.estimate.bits_per_weight < 4.6
    assert found.fit.requests > 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return Estimator(folder_of(LLAMA_70B, tmp_path_factory.mktemp("large")), target=parse_target("reference"))


def requests_of(estimator, asked, memory_bytes):
    passes = override(preset_recipe(asked.quant), [f"kv_layout.dtype={asked.kv_dtype}"]).passes
    return estimator.estimate(asked.quant, passes).fit(memory_bytes, asked.context).requests


@pytest.mark.parametrize(
    ("memory", "context", "quant"), [(24, 8192, "none"), (80, 131072, "none"), (40, 8192, "int4")]
)
def test_every_way_is_one_that_fits(large, memory, context, quant):
    asked = Asked(quant=quant, kv_dtype="auto", context=context, memory_bytes=memory * GIB)
    assert requests_of(large, asked, asked.memory_bytes) == 0
    ways = ways_to_fit(large, asked)
    assert len({way.asked for way in ways}) == 3
    for way in ways:
        assert requests_of(large, way.asked, way.asked.memory_bytes) == way.requests >= 1
        assert f"{way.requests} request" in way.text
        assert "bits a weight" in way.text
        if way.asked.memory_bytes > asked.memory_bytes:  # no more than it takes
            assert requests_of(large, way.asked, way.asked.memory_bytes - GIB // 5) == 0
        else:  # and no less than can be had
            longer = replace(way.asked, context=min(context, way.asked.context + 32))
            assert way.asked.context == context or requests_of(large, longer, memory * GIB) == 0


@needs_compiler
@pytest.mark.parametrize(
    ("target", "quant"),
    [
        ("reference", None),
        ("reference", "int4-fast"),
        ("cpu", "int8"),
        pytest.param("cpu", "int4", marks=pytest.mark.slow),
        pytest.param("onnx", "int4-fast", marks=pytest.mark.slow),
    ],
)
def test_a_bundled_model_is_as_large_as_predicted(stories_1m, tmp_path, target, quant):
    alone = tmp_path / "config"
    alone.mkdir()
    shutil.copyfile(stories_1m / "config.json", alone / "config.json")
    made = compile_model(stories_1m, output=tmp_path / "a.llmc", quant=quant, target=target, verify="off")
    manifest = open_artifact(made.path).manifest
    found = answer_fit(alone, memory_bytes=GIB, quant=quant, target=target)
    dry = compile_model(alone, quant=quant, target=target, dry_run=True)
    plan = manifest.memory
    stored = sum(view.data.nbytes for view in open_artifact(made.path).weights().values())
    assert found.fit.weight_bytes == dry.fit.weight_bytes
    assert found.estimate.bits_per_weight == dry.bits_per_weight
    assert found.estimate.cache == manifest.cache
    # What `int4` may spend on 8 bits is for tokens to decide: a plan is without it.
    growth = 1.03 if quant == "int4" else 1.0
    assert found.fit.weight_bytes <= plan.weight_bytes <= growth * found.fit.weight_bytes
    assert found.files.weights <= stored <= growth * found.files.weights
    assert dry.bits_per_weight <= made.bits_per_weight <= growth * dry.bits_per_weight
    assert stored < made.size_bytes <= growth * dry.size_bytes
    as_planned = replace(plan, weight_bytes=found.fit.weight_bytes)
    assert found.fit == fit_within(as_planned, manifest.cache, 512, GIB)


def check_family(name, folder, quant):
    family = family_named(name)
    raw = {**config_as_dict(config_of(family.config, dict(family.options))), "dtype": "bfloat16"}
    # Nine layers, where the family lets the number of layers be changed alone.
    if name in ("llama3", "gpt2"):
        raw["num_hidden_layers" if name == "llama3" else "n_layer"] = 9
    folder_of(raw, folder)
    estimator = Estimator(folder, target=CPU)
    recipe = preset_recipe(quant).passes
    whole = trace_config(read_config(folder).config, dtype=torch.bfloat16)
    context = PassContext(target=CPU, max_model_len=whole.spec.max_context, planning=True)
    front, back = until_stage(recipe, Stage.layout)
    with torch.no_grad():
        portable = run_passes(whole, front, context)
        final = run_passes(portable, back, context)
    found = estimator.estimate(quant, recipe)
    assert found.num_parameters == whole.spec.num_parameters
    assert found.num_layers == whole.spec.num_layers
    assert found.plan.weight_bytes == final.memory.weight_bytes
    assert found.plan.cache_bytes_per_token == final.memory.cache_bytes_per_token
    assert found.cache == final.cache
    assert found.bits_per_weight == bits_per_weight(final)
    assert found.plan.activation_bytes == pytest.approx(final.memory.activation_bytes, rel=0.01)
    stored = backend_for(CPU).stored_form(final, portable)
    assert estimator.file_bytes(recipe).weights == stored.total_bytes


@needs_compiler
@pytest.mark.parametrize("name", FAST)
def test_a_family_is_as_large_as_predicted(tmp_path, name):
    check_family(name, tmp_path, "int4")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in FAST])
def test_every_other_family_is_as_large_as_predicted(tmp_path, name):
    check_family(name, tmp_path, "int4")


def test_stored_layers_that_differ_are_counted_apart(stories_1m, tmp_path):
    whole = answer_fit(stories_1m, memory_bytes=GIB, quant="int8", target="reference")
    made = compile_model(
        stories_1m, output=tmp_path / "a.llmc", quant="int8", target="reference", verify="off"
    )
    assert whole.fit.weight_bytes == open_artifact(made.path).manifest.memory.weight_bytes


def test_weights_that_do_not_belong_are_named_as_the_user_knows_them(stories_1m, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories_1m, folder)
    raw = json.loads((folder / "config.json").read_text())
    folder_of({**raw, "num_hidden_layers": 5}, folder)
    with pytest.raises(ModelError, match="missing"):
        answer_fit(folder, memory_bytes=GIB, target="reference")
    with pytest.raises(ModelError, match="missing"):
        compile_model(folder, target="reference", dry_run=True)


def test_a_config_that_says_too_little_is_refused(tmp_path):
    plain = {name: value for name, value in LLAMA_70B.items() if name != "torch_dtype"}
    folder = folder_of(plain, tmp_path)
    with pytest.raises(ModelError) as caught:
        answer_fit(folder, memory_bytes=GIB, target="reference")
    assert caught.value.code == "model.no_dtype"
    assert "--dtype" in caught.value.fix
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    folder_of({**LLAMA_70B, "quantization_config": quantisation}, tmp_path)
    with pytest.raises(ModelError) as caught:
        answer_fit(folder, memory_bytes=GIB, target="reference")
    assert caught.value.code == "model.no_headers"


def test_a_context_beyond_the_models_is_refused(stories_1m):
    with pytest.raises(UsageError, match="600 tokens was asked for"):
        answer_fit(stories_1m, memory_bytes=GIB, context=600, target="reference")


def test_the_commands_answer_from_config_alone(tmp_path):
    folder = folder_of(LLAMA_70B, tmp_path)
    arguments = ["inspect", folder, "--fit", "--memory", "24GB", "--context", "8192", "--json"]
    told = json.loads(CliRunner().invoke(main, [str(part) for part in arguments]).output)
    assert told["fits"] is False
    assert told["memory_bytes"] == 24 * GIB
    assert [way["context"] for way in told["ways"]] == [8192] * 3
    dry = CliRunner().invoke(main, ["compile", str(folder), "--dry-run", "--quant", "int4", "--json"])
    told = json.loads(dry.stdout)
    assert told["dry_run"] is True
    assert told["memory"]["requests"] > 0 or len(told["ways"]) == 3
