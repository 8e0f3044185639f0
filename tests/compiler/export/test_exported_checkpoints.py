"""What is exported comes back: codes and scales bit for bit, logits with them, read by llmc and by others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

import llmc
from llmc.artifact.reader import open_artifact
from llmc.cli.main import main
from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.compare.quality import portable_program
from llmc.compiler.trace import trace_config
from llmc.ir.quantized import dequantize_rows
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of
from llmc.passes.quantize.keep_codes import KeepCodes
from llmc.spec.quant import parse_scheme

IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5]]
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
# Recipes of one step each; head and table stay values, so that nothing of the export is rounded.
PLAIN = {"head_bits": 0, "embedding_bits": 0}
CASES = {
    "asymmetric": ("qwen2", {}, [("rtn", PLAIN | {"bits": 4, "symmetric": False})]),
    "three_bits": ("llama", {}, [("rtn", PLAIN | {"bits": 3})]),
    "int8_inputs": ("llama", {}, [("rtn", PLAIN | {"bits": 8, "group_size": 0}), ("round_inputs", {})]),
    "floats": ("llama", {}, [("fp8", {})]),
    "experts": ("qwen3_moe", MOE, [("rtn", PLAIN | {"bits": 8})]),
    "mixed": (
        "llama",
        {},
        [
            ("rtn", PLAIN | {"bits": 4, "skip": "*.down_proj.weight, *o_proj.weight"}),
            ("rtn", PLAIN | {"bits": 8, "skip": "*o_proj.weight"}),
        ],
    ),
}


@dataclass(frozen=True)
class Made:
    """A model, its artifact, and the checkpoint exported of it."""

    model: Path
    artifact: Path
    out: Path
    report: dict

    @property
    def config(self):
        return json.loads((self.out / "config.json").read_text())["quantization_config"]

    @property
    def tensors(self):
        return load_file(self.out / "model.safetensors")

    @property
    def program(self):
        return portable_program(open_artifact(self.artifact))

    def reread(self):
        """The exported checkpoint as llmc reads it, its codes kept."""
        checkpoint = open_checkpoint(self.out)
        traced = trace_config(checkpoint.config, dtype=checkpoint.dtype)
        passes = (*canonicalise(), *fuse(), KeepCodes())
        return run_passes(bind_checkpoint(traced, checkpoint), passes, PassContext())


def write_model(folder, tokenizer, kind, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def export(artifact, out, model):
    arguments = ["export", artifact, "-o", out, "--model", model, "--json"]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def recipe(steps):
    """A recipe of the passes around quantisation, and `steps`."""
    listed = yaml.safe_load(CliRunner().invoke(main, ["recipe", "show", "none"]).output)
    places = [step if isinstance(step, str) else next(iter(step)) for step in listed["passes"]]
    behind = places.index("keep_codes") + 1
    listed["passes"][behind:behind] = [{name: options} if options else name for name, options in steps]
    return yaml.safe_dump(listed | {"name": "own"})


def compile_with(folder, model, steps):
    (folder / "recipe.yaml").write_text(recipe(steps))
    options = {"target": "reference", "verify": "off", "max_kl": 1e9, "max_model_len": 64}
    artifact = folder / "made.llmc"
    llmc.compile(str(model), output=str(artifact), recipe=str(folder / "recipe.yaml"), **options)
    return artifact


@pytest.fixture(scope="module")
def made(stories_1m, tmp_path_factory):
    """`made(case)` compiles and exports, once a case."""
    known = {}

    def build(case):
        if case not in known:
            kind, changes, steps = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            model = write_model(folder / "model", stories_1m, kind, **changes)
            artifact, out = compile_with(folder, model, steps), folder / "exported"
            result = export(artifact, out, model)
            assert result.exit_code == 0, result.output
            known[case] = Made(model, artifact, out, json.loads(result.stdout))
        return known[case]

    return build


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "kind", "forms"),
    [
        ("asymmetric", "pack-quantized", {"int4_g32_asym": 14}),
        slow("int8_inputs", "int-quantized", {"int8_channel, inputs int8_token": 14}),
        slow("floats", "float-quantized", {"fp8_channel, inputs fp8_token": 14}),
        slow("experts", "pack-quantized", {"int8_g32": 24, "int8_channel": 8}),
        slow("mixed", "pack-quantized", {"int4_g32": 10, "int8_g32": 2}),
    ],
)
def test_every_weight_and_logit_comes_back(made, case, kind, forms):
    done = made(case)
    before, after = done.program, done.reread()
    assert set(before.used_weights()) == set(after.used_weights())
    for name in before.used_weights():
        assert torch.equal(before.weights.evaluate(name), after.weights.evaluate(name)), name
    assert torch.equal(logits_of(before, IDS), logits_of(after, IDS))
    assert done.report["forms"] == forms
    assert done.report["dequantised"] == []
    assert done.config["format"] == kind


@pytest.mark.slow
@pytest.mark.parametrize("case", ["asymmetric", "three_bits", "int8_inputs", "floats", "mixed"])
def test_others_load_it_and_compute_the_same(made, case):
    """Zero points are read where weights are dequantised as they are loaded: left as codes, transformers 5.23
    makes room for them as they are before packing."""
    done = made(case)
    options, bound = {}, 0.03 if "inputs" in next(iter(done.report["forms"])) else 1e-4
    if case == "asymmetric":  # dequantised to the dtype of the scales, float16
        options, bound = {"quantization_config": CompressedTensorsConfig(dequantize=True)}, 2**-10
    model = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found = model(torch.tensor(IDS)).logits[0]
    expected = logits_of(done.program, IDS)
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.slow
def test_codes_of_three_bits_are_stored_in_four(made):
    done = made("three_bits")
    assert done.report["widened"]
    assert done.config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert torch.equal(logits_of(done.program, IDS), logits_of(done.reread(), IDS))


@pytest.mark.slow
def test_tables_and_heads_become_values(stories_1m, tmp_path):
    artifact = compile_with(tmp_path, stories_1m, [("rtn", {"bits": 4})])
    result = export(artifact, tmp_path / "exported", stories_1m)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dequantised"] == ["model.embed_tokens.weight"]
    weights = portable_program(open_artifact(artifact)).weights
    codes, scales = (weights.evaluate(f"model.embed_tokens.weight.{part}") for part in ("codes", "scales"))
    values = dequantize_rows(codes, scales, None, parse_scheme("int8_g32"), 128, torch.bfloat16)
    done = Made(stories_1m, artifact, tmp_path / "exported", {})
    assert torch.equal(done.tensors["model.embed_tokens.weight"], values)
    assert "lm_head" in done.config["ignore"]


def test_the_exported_model_must_be_the_one_that_was_compiled(made, tmp_path):
    done = made("asymmetric")
    other = shutil.copytree(done.model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused = export(done.artifact, tmp_path / "out", other)
    assert refused.exit_code == 2
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "export.other_model"
    assert "model.safetensors" in error["why"]
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_never_replaced(made):
    done = made("asymmetric")
    refused = export(done.artifact, done.out, done.model)
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]["code"] == "export.exists"


def test_the_report_says_what_was_written(made, tmp_path):
    done = made("asymmetric")
    arguments = ["export", done.artifact, "-o", tmp_path / "out", "--model", done.model]
    text = CliRunner().invoke(main, [str(argument) for argument in arguments]).stdout
    assert text.startswith(f"Wrote {tmp_path / 'out'}")
    assert "14 modules of int4_g32_asym" in text
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        done.out / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (done.model / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_an_artifact_without_codes_is_refused(made, tmp_path):
    model = made("asymmetric").model
    refused = export(compile_with(tmp_path, model, []), tmp_path / "out", model)
    assert json.loads(refused.stdout)["error"]["code"] == "export.nothing"
