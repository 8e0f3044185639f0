"""From a Hugging Face folder to an artifact that says what transformers says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmc
from llmc.artifact.reader import open_artifact
from llmc.compiler.driver import compile_model
from llmc.compiler.ledger import Silent
from llmc.ir.weights import Reader
from llmc.runtime.params import SamplingParams
from llmc.runtime.verify import verify_artifact

PROMPTS = (
    "Once upon a time",
    "The dog ran to the river and",
    "Lily had a red ball. One day,",
    'Tom said, "I want to',
)


@pytest.fixture(scope="module")
def plain(stories_7m, tmp_path_factory):
    """The bundled model in float32, with the result of its compile."""
    output = tmp_path_factory.mktemp("plain") / "stories.llmc"
    return compile_model(stories_7m, output=output, dtype="float32", target="reference")


def greedy_of_transformers(folder, prompts, num_tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids in prompts:
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([ids]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
            )
        yield tuple(whole[0, len(ids) :].tolist())


def test_greedy_tokens_equal_those_of_transformers(plain, stories_7m):
    """64 tokens a prompt, both sides in float32, the end token banned on both."""
    params = SamplingParams(temperature=0.0, max_tokens=64, min_tokens=64)
    with llmc.load(plain.path) as llm:
        results = llm.generate(PROMPTS, params)
    expected = greedy_of_transformers(stories_7m, [result.prompt_token_ids for result in results], 64)
    for result, tokens in zip(results, expected, strict=True):
        assert result.token_ids == tokens


def test_the_result_says_what_was_made(plain, stories_7m):
    artifact = open_artifact(plain.path)
    assert plain.size_bytes == artifact.size_bytes
    assert plain.bits_per_weight == pytest.approx(32, abs=0.5)
    assert plain.quality.max_abs < 1e-3
    assert plain.quality.same_top == 1.0
    assert plain.quality.tokens > 50
    assert plain.fit.fits
    assert plain.fit.requests > 1
    assert {entry.stage for entry in plain.ledger} >= {
        "open the model",
        "trace",
        "run passes",
        "write weights",
    }
    assert sum(entry.seconds for entry in plain.ledger) == pytest.approx(plain.seconds, rel=0.1)
    assert [entry.name for entry in plain.passes] == [record.name for record in artifact.manifest.history]
    keys = {"artifact", "target", "recipe", "seconds", "size_bytes", "bits_per_weight", "quality", "passes"}
    assert keys <= set(json.loads(json.dumps(plain.as_dict())))


def test_the_artifact_carries_report_provenance_and_tokenizer(plain, stories_7m):
    artifact = open_artifact(plain.path)
    report = json.loads(artifact.read_bytes("report.json"))
    assert report["quality"]["kl_mean"] == plain.quality.kl_mean
    assert [entry["name"] for entry in report["passes"]] == [entry.name for entry in plain.passes]
    provenance = artifact.manifest.provenance
    assert provenance.model == "stories-7m"
    digests = {entry.name: entry.sha256 for entry in provenance.files}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert digests[name] == hashlib.sha256((stories_7m / name).read_bytes()).hexdigest()
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert (artifact.tokenizer_folder / name).read_bytes() == (stories_7m / name).read_bytes()
    assert verify_artifact(plain.path) == []


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compiling_twice_gives_the_same_bytes(stories_1m, tmp_path):
    for name in ("one", "two"):
        compile_model(
            stories_1m,
            output=tmp_path / name / "out.llmc",
            quant="int4-fast",
            verify="off",
            target="reference",
        )
    assert contents(tmp_path / "one" / "out.llmc") == contents(tmp_path / "two" / "out.llmc")


def test_force_replaces_an_artifact(stories_1m, tmp_path):
    output = tmp_path / "out.llmc"
    first = compile_model(stories_1m, output=output, verify="off", target="reference")
    second = compile_model(
        stories_1m, output=output, quant="int4-fast", force=True, verify="off", target="reference"
    )
    assert second.size_bytes < first.size_bytes
    assert open_artifact(output).manifest.recipe.name == "int4-fast"
    assert [path.name for path in tmp_path.iterdir()] == ["out.llmc"]


def test_a_dry_run_loads_no_weight_and_writes_nothing(stories_1m, tmp_path, monkeypatch):
    def refuse(self, path, key):
        raise AssertionError(f"{key} was loaded")

    monkeypatch.setattr(Reader, "tensor", refuse)
    result = compile_model(
        stories_1m, output=tmp_path / "out.llmc", quant="int4", dry_run=True, target="reference"
    )
    assert list(tmp_path.iterdir()) == []
    assert result.quality is None
    assert result.fit.requests > 0
    assert f"{result.fit.requests} requests x 512 tokens" in result.fit.sentence()
    assert result.size_bytes > result.fit.weight_bytes


def test_output_is_named_after_model_and_preset(stories_1m, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compile_model(stories_1m, verify="off", target="reference").path == Path("stories-1m.llmc")
    assert compile_model(stories_1m, quant="int8", verify="off", target="reference").path == Path(
        "stories-1m-int8.llmc"
    )
    named = compile_model(stories_1m, quant="int4", dtype="float32", dry_run=True, target="reference")
    assert named.path == Path("stories-1m-int4-float32.llmc")
    assert {path.name for path in tmp_path.iterdir()} == {"stories-1m.llmc", "stories-1m-int8.llmc"}


def test_the_checkpoints_own_precision_is_kept(stories_1m, tmp_path):
    compile_model(stories_1m, output=tmp_path / "own.llmc", verify="off", target="reference")
    assert open_artifact(tmp_path / "own.llmc").manifest.spec.compute_dtype == "bfloat16"


def test_progress_hears_of_every_stage(stories_1m, tmp_path):
    class Heard(Silent):
        def __init__(self):
            self.begun, self.ended, self.advances = [], [], []

        def begin(self, stage):
            self.begun.append(stage)

        def end(self, stage, seconds):
            self.ended.append(stage)
            assert seconds >= 0

        def advance(self, done, total, what):
            self.advances.append((done, total, what))

    heard = Heard()
    result = compile_model(stories_1m, output=tmp_path / "out.llmc", progress=heard, target="reference")
    assert heard.begun == heard.ended == [entry.stage for entry in result.ledger]
    assert any(what == "model.embed_tokens.weight" for _, _, what in heard.advances)
    assert all(0 <= done <= total for done, total, _ in heard.advances)


def test_dumped_programs_are_readable(stories_1m, tmp_path):
    compile_model(
        stories_1m,
        output=tmp_path / "out.llmc",
        dry_run=True,
        dump_ir=tmp_path / "ir",
        verify="structure",
        target="reference",
    )
    dumps = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert dumps[0] == "00-input.txt"
    assert any("paged_attention" in name for name in dumps)


ODD = {
    "head_dim 8, width 72": {"hidden_size": 72, "head_dim": 8, "intermediate_size": 100, "vocab_size": 4099},
    "head_dim 80": {"hidden_size": 160, "head_dim": 80, "intermediate_size": 130, "vocab_size": 4097},
    "width 42": {
        "hidden_size": 42,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 50,
        "vocab_size": 4100,
        "tie_word_embeddings": True,
    },
}


def odd_model(folder, tokenizer_of, **changes):
    torch.manual_seed(0)
    options = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = AutoConfig.for_model("llama", **{**options, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tokenizer_of / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_compile_and_generate(shape, stories_1m, tmp_path):
    model = odd_model(tmp_path / "model", stories_1m, **ODD[shape])
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompt = tuple(range(1, 50))
    plain = compile_model(
        model, output=tmp_path / "plain.llmc", dtype="float32", verify="structure", target="reference"
    )
    with llmc.load(plain.path) as llm:
        (result,) = llm.generate([prompt], params)
    (expected,) = greedy_of_transformers(model, [prompt], 24)
    assert result.token_ids == expected
    quantised = compile_model(
        model, output=tmp_path / "int4.llmc", quant="int4-fast", verify="structure", target="reference"
    )
    assert quantised.bits_per_weight < 13  # groups that are mostly padding cost bits
    assert quantised.quality.kl_mean < 0.5
    with llmc.load(quantised.path) as llm:
        (result,) = llm.generate([prompt], params)
    assert len(result.token_ids) == 24
