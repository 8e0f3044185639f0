"""A shrunk config is small, of the same class, and has a layer of every kind."""

from __future__ import annotations

import pytest
import transformers as tf

from llmc.compiler.hf import adapter
from llmc.compiler.shrink import shrink

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}
PUBLISHED = {
    "llama": lambda: tf.LlamaConfig(num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
    "qwen2": lambda: tf.Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2),
    "gemma3": tf.Gemma3TextConfig,
    "gemma3n": tf.Gemma3nTextConfig,
    "gemma4": lambda: tf.Gemma4TextConfig(num_kv_shared_layers=20),
    "gpt_oss": tf.GptOssConfig,
    "deepseek_v3": tf.DeepseekV3Config,
    "phi3": lambda: tf.Phi3Config(rope_parameters=LONGROPE, pad_token_id=32000),
    "opt": lambda: tf.OPTConfig(hidden_size=1024, word_embed_proj_dim=512, num_hidden_layers=24),
    "gpt2": tf.GPT2Config,
    "gpt_bigcode": tf.GPTBigCodeConfig,
}


@pytest.fixture(params=PUBLISHED, scope="module")
def pair(request):
    config = PUBLISHED[request.param]()
    return adapter.readable_copy(config), shrink(config)


def test_same_class_and_small(pair):
    config, small = pair
    assert type(small) is type(config)
    assert adapter.num_layers(small) <= 8
    assert adapter.vocab_size(small) <= 128
    assert adapter.hidden_size(small) <= 2048
    assert adapter.num_heads(small) <= 16


def test_heads_keep_their_width_and_divide(pair):
    config, small = pair
    assert adapter.head_width(small) == adapter.head_width(config)
    assert adapter.num_heads(small) % adapter.num_kv_heads(small) == 0
    grouped = adapter.num_kv_heads(config) < adapter.num_heads(config)
    assert (adapter.num_kv_heads(small) < adapter.num_heads(small)) == grouped


def test_every_kind_of_layer_is_kept(pair):
    config, small = pair

    def kinds(one):
        names = getattr(one, "layer_types", None) or [""] * adapter.num_layers(one)
        dense = [i < (getattr(one, "first_k_dense_replace", 0) or 0) for i in range(len(names))]
        shared = [i >= len(names) - (getattr(one, "num_kv_shared_layers", 0) or 0) for i in range(len(names))]
        return set(zip(names, dense, shared, strict=True))

    assert kinds(small) == kinds(config)


def test_rope_and_ties_stay(pair):
    config, small = pair
    assert getattr(small, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    assert small.tie_word_embeddings == config.tie_word_embeddings
    assert adapter.max_positions(small) == adapter.max_positions(config)


def test_special_tokens_are_in_the_vocabulary(pair):
    _, small = pair
    for name in ("bos", "eos", "pad"):
        assert all(token < adapter.vocab_size(small) for token in adapter.token_ids(small, name))


def test_the_original_is_untouched():
    config = tf.GptOssConfig()
    text = config.to_json_string()
    shrink(config)
    assert config.to_json_string() == text
