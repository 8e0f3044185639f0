"""What is wrong with a model folder is said before anything is loaded, by name."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.compiler.checkpoint import open_checkpoint, parse_dtype
from llmc.compiler.shards import read_header
from llmc.compiler.source import find_model, source_name
from llmc.spec.errors import ModelError, UsageError


@pytest.fixture
def model(stories_1m, tmp_path):
    """A copy of the small bundled model that may be damaged."""
    return shutil.copytree(stories_1m, tmp_path / "model")


@pytest.fixture
def sharded(model):
    """The same in three shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, model / shard)
        weight_map |= dict.fromkeys(names[number::3], shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    assert all(part.endswith((".", "?")) for part in (caught.value.what, caught.value.why, caught.value.fix))
    return caught.value


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_bundled_model_opens(stories_7m):
    checkpoint = open_checkpoint(stories_7m)
    assert checkpoint.config.model_type == "llama"
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (4096, 256)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.tokenizer.files[0].name == "tokenizer.json"
    assert checkpoint.tokenizer.generation["eos_token_id"] == 0


def test_shards_open_like_one_file(sharded, stories_1m):
    whole, parts = open_checkpoint(stories_1m), open_checkpoint(sharded)
    assert {n: (t.shape, t.dtype) for n, t in parts.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in whole.tensors.items()
    }
    assert parts.num_bytes == whole.num_bytes


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    error = refusal(sharded)
    assert error.code == "model.missing_shard"
    assert error.what == "1 of 3 weight shards are missing: model-00002-of-00003.safetensors."


@pytest.mark.parametrize("keep", [0, 5, 50, -1])
def test_a_truncated_shard_is_named_with_both_sizes(sharded, keep):
    shard = sharded / "model-00003-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:keep])
    error = refusal(sharded)
    assert error.code == "model.truncated_shard"
    assert error.what == "model-00003-of-00003.safetensors is truncated."
    if keep == -1:
        assert f"promises {len(whole)} bytes and the file has {len(whole) - 1}" in error.why


def test_bytes_behind_the_last_tensor_are_damage(sharded):
    with (sharded / "model-00001-of-00003.safetensors").open("ab") as file:
        file.write(b"tail")
    assert "4 bytes behind the last tensor" in refusal(sharded).why


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{broken", "not JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"a": {"dtype": "F32"}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', "does not fill its bytes"),
    ],
)
def test_a_damaged_header_is_explained(tmp_path, header, reason):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ModelError, match=reason) as caught:
        read_header(file)
    assert caught.value.code == "model.damaged_shard"


def test_a_header_of_absurd_size_is_truncation(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + b"\0" * 64)
    with pytest.raises(ModelError, match="is truncated"):
        read_header(file)


def test_an_unknown_storage_type_is_named(tmp_path):
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(ModelError, match=r"'a' in x\.safetensors is stored as F4"):
        read_header(tmp_path / "x.safetensors")


def test_a_git_lfs_pointer_is_recognised(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert refusal(model).code == "model.lfs_pointer"


def test_an_index_that_does_not_fit_its_shards_is_refused(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00003.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensors are not in the shard the index names: model.layers.9.extra" in refusal(sharded).what
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert refusal(sharded).code == "model.bad_index"


def test_shards_without_their_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    error = refusal(sharded)
    assert error.code == "model.no_index"
    assert "3 safetensors file(s)" in error.what


def test_a_pickled_checkpoint_is_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refusal(model)
    assert error.code == "model.pickle"
    assert "pytorch_model.bin" in error.what
    assert "Convert the model to safetensors" in error.fix


def test_a_folder_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    assert refusal(model).code == "model.no_weights"


def test_a_model_without_tokenizer_is_refused(model):
    (model / "tokenizer.json").unlink()
    assert refusal(model).code == "model.no_tokenizer"
    (model / "merges.txt").touch()
    error = refusal(model)
    assert error.code == "model.slow_tokenizer"
    assert "merges.txt" in error.why


def test_an_empty_folder_and_other_folders_are_refused(tmp_path):
    assert refusal(tmp_path).code == "model.empty_folder"
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path).code == "model.no_config"
    (tmp_path / "adapter_config.json").touch()
    assert refusal(tmp_path).code == "model.is_adapter"
    (tmp_path / "manifest.json").touch()
    assert refusal(tmp_path).code == "model.is_artifact"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{ not json", b"[]", b"\xff\xfe"])
def test_unreadable_json_is_named(model, name, content):
    (model / name).write_bytes(content)
    error = refusal(model)
    assert error.code == "model.unreadable_json"
    assert error.what.startswith(name)


def test_an_unknown_model_type_names_the_closest(model):
    change_config(model, model_type="lama")
    error = refusal(model)
    assert error.code == "model.unknown_type"
    assert "'lama'" in error.what
    assert "llama" in error.why


def test_a_config_without_model_type_is_refused(model):
    change_config(model, model_type=None)
    assert refusal(model).code == "model.no_model_type"


def test_a_config_that_transformers_refuses_is_explained(model):
    change_config(model, num_attention_heads=5)
    error = refusal(model)
    assert error.code == "model.bad_config"
    assert "llama" in error.what


def test_a_method_of_quantisation_that_cannot_be_read_is_named(model):
    change_config(model, quantization_config={"quant_method": "hqq", "bits": 4})
    error = refusal(model)
    assert error.code == "model.quantised_form"
    assert "(hqq)" in error.what
    assert "gptq, awq, compressed-tensors, fp8" in error.why


def test_a_checkpoint_stored_in_eight_bits_has_no_compute_precision(model):
    tensors = load_file(model / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, model / "model.safetensors")
    with pytest.raises(ModelError, match="float8_e4m3fn"):
        _ = open_checkpoint(model).dtype


def test_an_unknown_dtype_names_those_that_exist():
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UsageError, match="Did you mean bfloat16"):
        parse_dtype("bfloat")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, "A"),
        ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "B"}, "B"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tools", "template": "T"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        ({}, None),
    ],
)
def test_the_chat_template_is_found_where_models_keep_it(model, files, expected):
    for name, content in files.items():
        (model / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = open_checkpoint(model).tokenizer
    assert tokenizer.chat_template == expected
    assert {path.name for path in tokenizer.files} >= set(files)


def test_sources_that_do_not_exist_are_told_apart(tmp_path, stories_1m):
    assert find_model(stories_1m) == stories_1m
    with pytest.raises(ModelError, match=r"config.json is a file\.") as caught:
        find_model(stories_1m / "config.json")
    assert caught.value.code == "model.not_a_folder"
    with pytest.raises(ModelError, match="The path does not exist"):
        find_model(tmp_path / "absent" / "deeper")
    with pytest.raises(ModelError, match=r"Download it first \(`hf download some/model`\)"):
        find_model("some/model", cache=tmp_path)


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, stories_1m):
    repository = tmp_path / "models--some--model"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(stories_1m, repository / "snapshots" / revision)
    folder = find_model("some/model", cache=tmp_path)
    assert folder == repository / "snapshots" / revision
    assert open_checkpoint(folder).config.model_type == "llama"


def test_names_of_sources_fit_file_names(stories_1m):
    assert source_name(stories_1m) == "stories-1m"
    assert source_name("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B"
    assert source_name("odd/na me:x") == "na-me-x"
