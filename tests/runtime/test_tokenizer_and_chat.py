"""The tokenizer folder as Hugging Face reads it: special tokens, templates, defaults, and broken folders."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from llmc.runtime.chat import ChatTemplate
from llmc.runtime.tokenizer import Tokenizer
from llmc.spec.errors import ArtifactError, RequestError

STORIES = Path(__file__).resolve().parents[2] / "models" / "stories-1m"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('a system message must come first') }}{% endif %}\n"
    "    {% if message['role'] == 'skip' %}{% continue %}{% endif %}\n"
    "<|{{ message['role'] }}|>{% generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": " Grüße <b> & 'x' "},
    {"role": "skip", "content": "never"},
    {"role": "assistant", "content": "Hi"},
]


def write_folder(folder, config=None, post_processor=True, **files):
    vocab = {
        "<s>": 0,
        "</s>": 1,
        **{s: i + 2 for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(4)
    if post_processor:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    base = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**base, **(config or {})}), encoding="utf-8")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


CONFIGS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_eos_token": True},
]


@pytest.mark.pure
@pytest.mark.parametrize("post_processor", [True, False])
def test_the_post_processor_decides_on_special_tokens(tmp_path, post_processor):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "t", {"add_eos_token": True}, post_processor))
    token_ids = tokenizer.encode("a longer text than four tokens")
    assert (token_ids[0] == 0) == post_processor
    assert token_ids[-1] != 1
    assert len(token_ids) > 20
    assert tokenizer.decode(token_ids) == "a longer text than four tokens"
    assert tokenizer.encode("ab", add_special_tokens=False) == token_ids_of(tokenizer, "ab")


def token_ids_of(tokenizer, text):
    return tuple(tokenizer.token_to_id(character) for character in text)


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_ids_as_transformers(tmp_path, config, post_processor):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "t", config, post_processor)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in ("hello wörld", "", "</s> inside <s>", " 😀"):
        assert list(ours.encode(text)) == theirs(text, truncation=False)["input_ids"]


def test_same_chat_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "t", chat_template__jinja=TEMPLATE)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    tools = [{"type": "function", "function": {"name": "f", "description": "größer < 'a'"}}]
    for fields in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=False, **{"add_generation_prompt": True, **fields}
        )
        assert ours.render_chat(MESSAGES, **fields) == expected


def test_bundled_tokenizer_reads_as_transformers_reads_it():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(STORIES)
    ours = Tokenizer.from_folder(STORIES)
    text = "Once upon a time, Lily’s dog said: “Hello!”\n\n  Then 😀 ran."
    assert list(ours.encode(text)) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert not ours.has_chat_template
    assert ours.defaults.params().temperature == 0.0


@pytest.mark.pure
def test_generation_defaults(tmp_path):
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 7]}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "t", generation_config__json=config))
    params = tokenizer.defaults.params(max_tokens=5)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 0.95, 5)
    assert tokenizer.eos_token_ids == (1, 7)
    assert tokenizer.bos_token_id == 0
    config["do_sample"] = False
    greedy = Tokenizer.from_folder(write_folder(tmp_path / "g", generation_config__json=config))
    assert (greedy.defaults.params().temperature, greedy.defaults.params().top_k) == (0.0, 0)


@pytest.mark.pure
def test_special_tokens_written_as_objects(tmp_path):
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": {"content": "<s>"}}
    folder = write_folder(tmp_path / "t", {"eos_token": None}, special_tokens_map__json=special)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    assert tokenizer.eos_token_ids == (1,)


@pytest.mark.pure
def test_named_templates_in_the_configuration(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "t", {"chat_template": named}))
    assert tokenizer.render_chat(MESSAGES) == "D</s>"


@pytest.mark.pure
def test_templates_refuse_in_their_own_words():
    template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    late = [*MESSAGES, {"role": "system", "content": "x"}]
    with pytest.raises(RequestError, match="It says: a system message must come first"):
        template.render(late)
    with pytest.raises(RequestError, match="There are no messages"):
        template.render([])
    with pytest.raises(RequestError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})


@pytest.mark.pure
@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{{ 1 // 0 }}",
        "{{ messages[5].role.x }}",
    ],
)
def test_templates_are_held_in_a_sandbox(attack):
    with pytest.raises(RequestError, match="refused these messages"):
        ChatTemplate(attack, {}).render(MESSAGES)


@pytest.mark.pure
def test_templates_may_ask_for_the_date():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}, now=lambda: datetime(2024, 7, 1))
    assert template.render(MESSAGES) == "2024-07-01"


@pytest.mark.pure
def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    for name, content in (
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("generation_config.json", "x"),
    ):
        folder = write_folder(tmp_path / "broken")
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
            Tokenizer.from_folder(folder)
        shutil.rmtree(folder)
    plain = Tokenizer.from_folder(write_folder(tmp_path / "plain"))
    with pytest.raises(RequestError, match="This model has no chat template"):
        plain.render_chat(MESSAGES)
