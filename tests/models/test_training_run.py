"""A tokenizer, a target and its draft, trained in a few steps through the command line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.models.train import main


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    names, deeds = ["Tim", "Sue", "Ben"], ["saw a big dog", "ate a red apple", "ran to the tree"]
    stories = [f"{a} {d}. {b} was happy." for a in names for b in names for d in deeds] * 8
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories))
    return path


@pytest.fixture(scope="module")
def pair(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    run("tokenizer", text, "-o", folder / "tokenizer", "--vocab-size", 300, "--context", 32)
    common = ["--tokenizer", folder / "tokenizer", "--valid", text, "--context", 32, "--threads", 1]
    target = ["--layers", 2, "--steps", 25, "--batch", 8]
    log = run("model", text, "-o", folder / "target", *common, *target)
    distil = ["--shape", "draft", "--teacher", folder / "target", "--steps", 5]
    run("model", text, "-o", folder / "draft", *common, *distil)
    grow = ["--layers", 3, "--grow-from", folder / "target", "--steps", 1]
    run("model", text, "-o", folder / "grown", *common, *grow)
    return folder, log


@pytest.mark.slow
def test_training_lowers_the_loss(pair):
    losses = [float(loss) for loss in re.findall(r"text ([\d.]+)", pair[1])]
    assert losses[0] > 5
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.slow
def test_the_folders_load_as_hugging_face_models(pair):
    folder, _ = pair
    for name, layers in (("target", 2), ("draft", 2), ("grown", 3)):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        ids = tokenizer("Tim saw", return_tensors="pt")["input_ids"]
        assert ids[0, 0] == 0
        assert model.dtype == torch.bfloat16
        assert model.config.num_hidden_layers == layers
        assert model.generation_config.eos_token_id == 0
        assert torch.isfinite(model(ids).logits).all()
    assert Tokenizer.from_file(str(folder / "target" / "tokenizer.json")).id_to_token(0) == "<|endoftext|>"


@pytest.mark.slow
def test_the_record_says_how_the_model_came_about(pair):
    folder, _ = pair
    record = json.loads((folder / "draft" / "training.json").read_text())
    assert record["distilled_from"] == "target"
    assert record["steps"] == 5
    assert record["tokens_seen"] == 5 * 6 * 32
    assert record["valid_perplexity"] > 1
    assert json.loads((folder / "grown" / "training.json").read_text())["grown_from"] == "target"


@pytest.mark.slow
def test_evaluation_measures_text_and_speculation(pair, text):
    folder, _ = pair
    output = run(
        "evaluate",
        folder / "target",
        text,
        "--draft",
        folder / "target",
        "--prompts",
        3,
        "--prompt-tokens",
        4,
    )
    assert "perplexity" in output
    # A draft that is the target itself has everything accepted.
    assert "accepted 1.000 of proposed" in output


@pytest.mark.slow
def test_impossible_sizes_end_with_a_message(pair, text):
    folder, _ = pair
    result = CliRunner().invoke(
        main,
        [
            *("model", str(text), "-o", str(folder / "none"), "--tokenizer", str(folder / "tokenizer")),
            *("--valid", str(text), "--steps", "0"),
        ],
    )
    assert result.exit_code == 1
    assert "steps must be at least 1" in result.output
    assert not (folder / "none").exists()
