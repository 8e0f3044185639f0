"""Calibration files: every form that is read, and every one that is refused, with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import llmc
from llmc.compiler.calibration import built_in_sequences, read_sequences, results_folder
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.driver import compile_model
from llmc.compiler.trace import trace_config
from llmc.runtime.tokenizer import Tokenizer
from llmc.spec.errors import CheckFailed, TargetError, UsageError

STORY = (
    "Once upon a time there was a dog. The dog liked to run and play in the big green park with Tom. " * 40
)


@pytest.fixture(scope="module")
def tokenizer(stories_1m):
    return Tokenizer.from_folder(stories_1m)


@pytest.fixture(scope="module")
def spec(stories_1m):
    checkpoint = open_checkpoint(stories_1m)
    return trace_config(checkpoint.config, dtype=checkpoint.dtype, max_context=None).spec


def test_text_is_cut_at_the_end_of_text_and_into_sequences(tmp_path, tokenizer, spec):
    path = tmp_path / "stories.txt"
    path.write_text(f"{STORY}\n<|endoftext|>\n{STORY}")
    found = read_sequences(path, tokenizer, spec)
    tokens = [token for sequence in found for token in sequence]
    assert {len(sequence) for sequence in found[:-1]} == {512}
    (end,) = tokenizer.eos_token_ids
    story = list(tokenizer.encode(STORY.strip()))
    assert tokens == [*story, end, *story, end]


def test_json_lines_give_the_same_tokens_as_text(tmp_path, tokenizer, spec):
    text = tmp_path / "stories.txt"
    text.write_text(STORY)
    for name, value in (("text", {"text": STORY.strip()}), ("bare", STORY.strip())):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(value) + "\n\n")
        assert read_sequences(path, tokenizer, spec) == read_sequences(text, tokenizer, spec)


def test_no_more_is_read_than_is_wanted(tmp_path, tokenizer, spec):
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>".join([STORY] * 200))
    assert len(read_sequences(path, tokenizer, spec)) == 256


def test_the_built_in_text_is_the_same_every_time(tokenizer, spec):
    found = built_in_sequences(tokenizer, spec)
    assert found == built_in_sequences(tokenizer, spec)
    assert len(found) == 256


@pytest.mark.parametrize(
    ("name", "content", "code", "why"),
    [
        ("a.txt", b"", "calibration.unreadable", "it is empty"),
        ("a.txt", b"caf\xe9 \xff", "calibration.unreadable", "byte 3 is not UTF-8"),
        ("a.txt", b"too short", "calibration.too_short", "At least 512"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "calibration.bad_line", "it is not JSON"),
        ("a.jsonl", b'{"body": "a"}', "calibration.bad_line", 'neither "text" nor "messages"'),
        ("a.jsonl", b"[1]", "calibration.bad_line", 'neither "text" nor "messages"'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "calibration.no_chat_template", "no chat template"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, tokenizer, spec, name, content, code, why):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_sequences(path, tokenizer, spec)
    assert caught.value.code == code
    assert why in caught.value.why
    assert name in caught.value.what


def test_a_missing_file_and_another_models_tokens_are_refused(tmp_path, tokenizer, spec):
    with pytest.raises(UsageError, match="No such file"):
        read_sequences(tmp_path / "none.txt", tokenizer, spec)
    path = tmp_path / "stories.txt"
    path.write_text(STORY)
    with pytest.raises(UsageError, match="The model knows 20 tokens"):
        read_sequences(path, tokenizer, replace(spec, vocab_size=20))


def test_results_stay_only_for_a_run_that_can_go_on(tmp_path):
    output = tmp_path / "out.llmc"

    def fails(error):
        with results_folder(output) as folder:
            folder.mkdir(exist_ok=True)
            (folder / "segment").write_bytes(b"found")
            raise error

    full = TargetError("target.disk_full", "a", "b", "c")
    refused = CheckFailed("quality.kl", "a", "b", "c")
    for error, stays in ((full, True), (refused, False), (KeyboardInterrupt(), True)):
        with pytest.raises(type(error)) as caught:
            fails(error)
        assert bool(list(tmp_path.iterdir())) == stays
        assert ("is kept in" in str(caught.value)) == (error is full)
    with results_folder(output) as folder:
        folder.mkdir(exist_ok=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_full_disk_leaves_nothing_that_the_cache_has(tmp_path, is_cached):
    def fails():
        with results_folder(tmp_path / "out.llmc") as folder:
            folder.mkdir()
            (folder / "segment").write_bytes(b"found")
            if is_cached:
                (tmp_path / "cache").hardlink_to(folder / "segment")
            raise TargetError("target.disk_space", "a", "b", "c")

    with pytest.raises(TargetError):
        fails()
    assert (tmp_path / ".out.llmc.results").exists() != is_cached


def test_a_compile_calibrates_on_its_file_and_records_it(tmp_path, stories_1m):
    path = tmp_path / "stories.txt"
    path.write_text(STORY)
    output = tmp_path / "out.llmc"
    options = {"target": "reference", "verify": "off", "output": output}
    result = compile_model(stories_1m, quant="int4", calibration=path, **options)
    assert result.quality.kl_mean < 0.3
    report = json.loads((output / "report.json").read_bytes())
    assert report["calibration"]["source"] == "stories.txt"
    (gptq,) = (record for record in report["passes"] if record["name"] == "gptq")
    assert all(entry["error"] <= entry["nearest_error"] for entry in gptq["errors"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.llmc", "stories.txt"]
    with llmc.load(output) as llm:
        assert llm.generate(["Once upon a time"])[0].token_ids


def test_a_model_too_far_off_and_a_file_that_nobody_reads_are_refused(tmp_path, stories_1m):
    path = tmp_path / "stories.txt"
    path.write_text(STORY)
    options = {"target": "reference", "verify": "off", "output": tmp_path / "out.llmc"}
    with pytest.raises(CheckFailed) as caught:
        compile_model(stories_1m, quant="int4-fast", max_kl=1e-6, **options)
    assert caught.value.code == "quality.kl"
    with pytest.raises(UsageError) as caught:
        compile_model(stories_1m, quant="int8", calibration=path, **options)
    assert caught.value.code == "calibration.unused"
    assert [entry.name for entry in tmp_path.iterdir()] == ["stories.txt"]
