"""The commands on a real artifact: compile, generate, inspect, verify, and what they say about damage."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from llmc.artifact.schema import SCHEMA_VERSION
from llmc.cli.main import main
from llmc.runtime.tokenizer import Tokenizer


def run(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def answer(*arguments, **options):
    """The JSON object a command prints; nothing else may be on stdout."""
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def artifact(stories_1m, tmp_path_factory):
    """The small bundled model with 4-bit weights, made by the command line."""
    path = tmp_path_factory.mktemp("artifact") / "stories.llmc"
    report = answer(
        "compile",
        stories_1m,
        "--target",
        "reference",
        "--quant",
        "int4-fast",
        "--verify",
        "structure",
        "-o",
        path,
    )
    keys = {"artifact", "target", "recipe", "seconds", "size_bytes", "bits_per_weight", "quality", "passes"}
    assert keys <= set(report)
    quality = report["quality"]
    assert {"perplexity", "reference_perplexity", "kl_mean", "kl_p99", "same_top"} <= set(quality)
    for name in ("perplexity", "kl_mean", "same_top"):
        low, high = quality[f"{name}_interval"]
        assert low <= quality[name] <= high
    assert 0 <= quality["greedy_match"] <= quality["tokens"] / quality["prompts"]
    assert {"name", "seconds", "matches", "cached"} == set(report["passes"][0])
    assert report["artifact"] == str(path)
    return path


@pytest.fixture
def copy(artifact, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(artifact, tmp_path / "copy.llmc")


def test_compile_prints_a_ledger_and_a_summary(stories_1m, tmp_path):
    result = run(
        "compile", stories_1m, "--target", "reference", "-o", tmp_path / "out.llmc", "--verify", "off"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"Wrote {tmp_path / 'out.llmc'}")
    assert "bits a weight" in result.stdout
    assert "requests x 512 tokens" in result.stdout
    assert " s  trace" in result.stderr
    again = run(
        "compile", stories_1m, "--target", "reference", "-o", tmp_path / "out.llmc", "--verify", "off"
    )
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_a_quiet_dry_run_prints_its_result_alone(stories_1m, tmp_path):
    result = run(
        "compile", stories_1m, "--target", "reference", "-o", tmp_path / "out.llmc", "--dry-run", "--quiet"
    )
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("Would write")
    assert not (tmp_path / "out.llmc").exists()


def test_generate_streams_the_text_behind_its_prompt(artifact):
    result = run("generate", artifact, "--prompt", "Once upon a time", "--max-tokens", 12)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")
    whole = answer("generate", artifact, "--prompt", "Once upon a time", "--max-tokens", 12)
    assert result.stdout == f"Once upon a time{whole['text']}\n"


def test_generate_as_json_has_the_promised_keys(artifact):
    found = answer("generate", artifact, "--prompt", "The dog", "--max-tokens", 5, "--ignore-eos")
    keys = {
        "prompt_token_ids",
        "token_ids",
        "text",
        "finish_reason",
        "ttft_s",
        "tpot_s",
        "load_s",
        "executor",
    }
    assert keys == set(found)
    assert len(found["token_ids"]) == 5
    assert found["finish_reason"] == "length"
    assert found["executor"] == "reference"
    assert found["load_s"] > 0


def test_prompts_come_from_options_files_and_standard_input(artifact, tmp_path):
    (tmp_path / "prompt.txt").write_text("The dog\n")
    alone = answer("generate", artifact, "--prompt", "The dog", "--max-tokens", 4)
    from_file = answer("generate", artifact, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 4)
    from_stdin = answer("generate", artifact, "-", "--max-tokens", 4, input="The dog\n")
    assert alone["token_ids"] == from_file["token_ids"] == from_stdin["token_ids"]
    both = answer("generate", artifact, "--prompt", "The dog", "--prompt", "A cat", "--max-tokens", 4)
    assert both["results"][0]["token_ids"] == alone["token_ids"]
    assert len(both["results"]) == 2


def test_a_seed_makes_sampling_repeatable(artifact):
    options = ("--prompt", "The", "--max-tokens", 12, "--temperature", 1.5, "--top-k", 50, "--ignore-eos")
    one, two, other = (answer("generate", artifact, *options, "--seed", seed) for seed in (7, 7, 8))
    assert one["token_ids"] == two["token_ids"]
    assert one["token_ids"] != other["token_ids"]


@pytest.mark.parametrize(
    ("options", "code", "fragments"),
    [
        (["--prompt", ""], "request.empty_prompt", ["empty"]),
        (["--prompt", "word " * 600], "request.prompt_too_long", ["512"]),
        (["--prompt", "x", "--temperature", "-1"], "request.temperature", ["-1"]),
        (["--prompt", "x", "--top-p", "2"], "request.top_p", ["2"]),
        (["--prompt", "x", "--chat"], "request.no_chat_template", ["chat template"]),
    ],
)
def test_bad_requests_are_refused_by_name(artifact, options, code, fragments):
    result = run("generate", artifact, *options, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["code"] == code
    assert all(fragment in " ".join(error.values()) for fragment in fragments)


def test_a_prompt_beyond_the_context_is_told_both_numbers(artifact):
    text = "a b c " * 180
    num_tokens = len(Tokenizer.from_folder(artifact / "tokenizer").encode(text))
    result = run("generate", artifact, "--prompt", text)
    assert result.exit_code == 2
    assert f"The prompt has {num_tokens} tokens, and the context is 512 tokens." in result.stderr


def test_inspect_tells_what_is_inside(artifact, stories_1m):
    found = answer("inspect", artifact)
    assert found["spec"]["family"] == "llama"
    assert found["recipe"]["name"] == "int4-fast"
    assert any(entry["name"] == "scale_search" for entry in found["history"])
    assert "llmc.paged_attention" in run("inspect", artifact, "--program").output
    explained = run("inspect", artifact, "--pass", "scale_search").output
    assert "int4_g32" in explained
    missing = run("inspect", artifact, "--pass", "rtm")
    assert missing.exit_code == 2
    assert "scale_search" in missing.stderr
    fit = answer("inspect", artifact, "--fit", "--memory", "1G", "--context", 100)
    page = found["cache"]["groups"][0]["page_tokens"]
    assert fit["request_bytes"] == -(-100 // page) * page * fit["cache_bytes_per_token"]
    beside = fit["needed_bytes"] - fit["request_bytes"]
    assert fit["requests"] == (2**30 - beside) // fit["request_bytes"] > 0
    tight = answer("inspect", artifact, "--fit", "--memory", str(beside + 1))
    assert tight["requests"] == 0
    assert len(tight["ways"]) == 3
    assert run("inspect", artifact, "--fit", "--context", 100_000).exit_code == 2
    model = answer("inspect", stories_1m)
    assert model["model_type"] == "llama"
    assert model["stored_dtypes"] == ["bfloat16"]


def test_passes_and_recipes_are_shown_and_checked(tmp_path, stories_1m):
    names = [entry["name"] for entry in answer("passes")["passes"]]
    assert {"normalize", "rtn", "kv_layout", "memory_plan"} <= set(names)
    assert "page_tokens" in run("passes", "kv_layout").output
    assert "kv_layout" in run("passes", "kv_layuot").stderr
    assert {entry["name"] for entry in answer("recipe", "list")["presets"]} >= {"int4", "int8"}
    text = run("recipe", "show", "int4").output
    assert text.startswith("# the one to start with: 4-bit weights in groups of 32, calibrated\n")
    recipe = tmp_path / "my.yaml"
    recipe.write_text(text)
    assert run("recipe", "check", recipe).exit_code == 0
    recipe.write_text(text.replace("bits: 4", "bits: 5"))
    assert run("recipe", "check", recipe).exit_code == 2
    recipe.write_text(text.replace("  - kv_layout", "  - kv_layuot"))
    assert "kv_layout" in run("recipe", "check", recipe).stderr
    assert run("recipe", "show", "int44").exit_code == 2


def test_an_edited_recipe_compiles(tmp_path, stories_1m):
    recipe = tmp_path / "my.yaml"
    recipe.write_text(run("recipe", "show", "int8").output.replace("name: int8", "name: mine"))
    options = ("--recipe", recipe, "--set", "scale_search.bits=4", "--verify", "off")
    output = ("-o", tmp_path / "out.llmc")
    found = answer("compile", stories_1m, "--target", "reference", *options, *output)
    assert found["recipe"] == "mine"
    assert found["bits_per_weight"] < 8


def test_eval_says_how_far_it_is_and_where_it_was_lost(artifact, stories_1m, tmp_path, heldout_stories):
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>".join(heldout_stories[:6]))
    found = answer("eval", artifact, "--data", text, "--reference", stories_1m)
    assert found["documents"] == 6
    assert 0 < found["kl_mean"] < 0.2
    assert found["kl_mean_interval"][0] <= found["kl_mean"] <= found["kl_mean_interval"][1]
    assert 4 < found["bits_per_weight"] < 9
    errors = [layer["error"] for layer in found["worst_layers"]]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert all(layer["error"] <= layer["nearest_error"] for layer in found["worst_layers"])


def test_a_whole_artifact_verifies(artifact):
    assert answer("verify", artifact) == {"ok": True, "problems": []}


def test_a_flipped_bit_in_any_file_is_found_and_named(copy):
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        name = path.relative_to(copy).as_posix()
        result = run("verify", copy, "--json")
        assert result.exit_code == 1, name
        assert any(problem.startswith(name) for problem in json.loads(result.stdout)["problems"]), name
        refused = run("generate", copy, "--prompt", "x")
        assert refused.exit_code == 3, name
        assert name in refused.stderr
        path.write_bytes(original)
    assert run("verify", copy).exit_code == 0


def test_a_missing_or_foreign_file_is_found(copy):
    (copy / "notes.txt").write_text("not part of it")
    assert "notes.txt" in run("verify", copy).output
    (copy / "notes.txt").unlink()
    (copy / "report.json").unlink()
    refused = run("generate", copy, "--prompt", "x")
    assert refused.exit_code == 3
    assert "report.json is missing" in refused.stderr


def test_an_artifact_of_a_newer_schema_is_refused_with_both_versions(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schema_version"] = SCHEMA_VERSION + 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused = run("generate", copy, "--prompt", "x")
    assert refused.exit_code == 3
    assert f"schema version {SCHEMA_VERSION + 1}" in refused.stderr
    assert f"up to {SCHEMA_VERSION}" in refused.stderr


def test_a_model_is_no_artifact_and_says_so(stories_1m):
    refused = run("generate", stories_1m, "--prompt", "x")
    assert refused.exit_code == 3
    assert "must be compiled first" in refused.stderr


def test_errors_as_json_are_one_object_on_stdout():
    result = run("compile", "no/such/folder/anywhere", "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"code", "what", "why", "fix"}
    assert error["code"] == "model.not_found"
    assert result.stderr == ""
