"""The model families that are checked: a small configuration of each, and what must come of compiling it.
Data only; knows neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

_VOCAB = 97
_COMMON: Mapping[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: Mapping[str, Any] = {
    "vocab_size": _VOCAB,
    "n_positions": 256,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(8)],
    "long_factor": [2.0 + 0.3 * index for index in range(8)],
    "original_max_position_embeddings": 16,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_FEW_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One configuration: a config class of transformers and its arguments.

    `refused` is the code of the error that compiling it must raise, None where it must succeed.
    """

    name: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: str | None = None
    note: str = ""


def _family(
    name: str,
    config: str,
    options: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Any] = _COMMON,
    without: tuple[str, ...] = (),
    refused: str | None = None,
    note: str = "",
) -> Family:
    merged = {key: value for key, value in {**base, **(options or {})}.items() if key not in without}
    return Family(name=name, config=config, options=merged, refused=refused, note=note)


_NO_GQA = ("num_key_value_heads",)
_SHORT_WINDOW = {"sliding_window": 8}
_WIDE_HEADS = {"head_dim": 16}
_OWN_ATTENTION = "model.no_attention_interface"
_MIXER = "model.mixer"

FAMILIES: tuple[Family, ...] = (
    _family("llama", "LlamaConfig"),
    _family("llama3", "LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    _family("llama-yarn", "LlamaConfig", {"rope_parameters": _YARN_ROPE}),
    _family(
        "llama-dynamic",
        "LlamaConfig",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
        refused="model.rope_dynamic",
        note="frequencies that follow the batch",
    ),
    _family("mistral", "MistralConfig", _SHORT_WINDOW),
    _family("ministral", "MinistralConfig", {**_SHORT_WINDOW, **_WIDE_HEADS, "layer_types": _ALTERNATING}),
    _family("ministral3", "Ministral3Config", _WIDE_HEADS, note="queries scaled by position"),
    _family("qwen2", "Qwen2Config"),
    _family(
        "qwen2-swa",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        note="window in the upper layers only",
    ),
    _family("qwen3", "Qwen3Config", {"head_dim": 32}),
    _family("qwen2_moe", "Qwen2MoeConfig", {**_FEW_EXPERTS, "shared_expert_intermediate_size": 48}),
    _family("qwen3_moe", "Qwen3MoeConfig", {**_FEW_EXPERTS, "head_dim": 32}),
    _family("mixtral", "MixtralConfig", _LOCAL_EXPERTS),
    _family("gemma", "GemmaConfig", _WIDE_HEADS),
    _family("gemma2", "Gemma2Config", {**_WIDE_HEADS, **_SHORT_WINDOW, "query_pre_attn_scalar": 16}),
    _family(
        "gemma3",
        "Gemma3TextConfig",
        {
            **_WIDE_HEADS,
            **_SHORT_WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
        },
        note="local and global rope",
    ),
    _family(
        "gemma3n",
        "Gemma3nTextConfig",
        {
            **_WIDE_HEADS,
            **_SHORT_WINDOW,
            "vocab_size_per_layer_input": _VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "layer_types": _ALTERNATING,
            "activation_sparsity_pattern": None,
        },
        note="upper layers read the cache of lower ones",
    ),
    _family(
        "gemma4",
        "Gemma4TextConfig",
        {
            **_WIDE_HEADS,
            **_SHORT_WINDOW,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": _VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": _ALTERNATING,
        },
        note="two head widths",
    ),
    _family("phi3", "Phi3Config", _SHORT_WINDOW),
    _family(
        "phi3-longrope",
        "Phi3Config",
        {"original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
        note="factors chosen by the longest context compiled for",
    ),
    _family("phi", "PhiConfig", {"partial_rotary_factor": 0.5}),
    _family("phimoe", "PhimoeConfig", {"num_local_experts": 4, **_SHORT_WINDOW}),
    _family("gpt_neox", "GPTNeoXConfig", {"rotary_pct": 0.25}, without=_NO_GQA),
    _family("gpt2", "GPT2Config", base=_GPT2),
    _family("gpt_bigcode", "GPTBigCodeConfig", {"pad_token_id": 0}, base=_GPT2),
    _family(
        "opt",
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
        without=("intermediate_size", "num_key_value_heads"),
    ),
    _family(
        "falcon",
        "FalconConfig",
        {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
        without=("intermediate_size", "num_key_value_heads"),
        refused=_OWN_ATTENTION,
    ),
    _family(
        "falcon-new",
        "FalconConfig",
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        without=("intermediate_size", "num_key_value_heads"),
        refused=_OWN_ATTENTION,
    ),
    _family(
        "bloom",
        "BloomConfig",
        base={"vocab_size": _VOCAB, "hidden_size": 64, "n_layer": 4, "n_head": 4, "pad_token_id": 0},
        refused=_OWN_ATTENTION,
        note="ALiBi",
    ),
    _family(
        "mpt",
        "MptConfig",
        base={"vocab_size": _VOCAB, "d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 256},
        refused=_OWN_ATTENTION,
        note="ALiBi",
    ),
    _family("gptj", "GPTJConfig", {"rotary_dim": 8}, base=_GPT2, refused=_OWN_ATTENTION),
    _family(
        "granite",
        "GraniteConfig",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 3.0,
        },
    ),
    _family("granitemoe", "GraniteMoeConfig", _LOCAL_EXPERTS),
    _family("olmo", "OlmoConfig", {"clip_qkv": 0.5}),
    _family("olmo2", "Olmo2Config"),
    _family("olmo3", "Olmo3Config", _SHORT_WINDOW),
    _family("olmoe", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    _family(
        "smollm3",
        "SmolLM3Config",
        {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False},
        note="layers without rope",
    ),
    _family("starcoder2", "Starcoder2Config", _SHORT_WINDOW),
    _family("stablelm", "StableLmConfig", {"partial_rotary_factor": 0.25, "qk_layernorm": True}),
    _family("stablelm-par", "StableLmConfig", {"partial_rotary_factor": 0.25, "use_parallel_residual": True}),
    _family("cohere", "CohereConfig", {"use_qk_norm": True}),
    _family("cohere2", "Cohere2Config", _SHORT_WINDOW, note="layers without rope"),
    _family("glm", "GlmConfig", _WIDE_HEADS),
    _family("glm4", "Glm4Config", _WIDE_HEADS),
    _family("glm4_moe", "Glm4MoeConfig", {**_WIDE_HEADS, **_ROUTED_EXPERTS}),
    _family(
        "gpt_oss",
        "GptOssConfig",
        {
            **_WIDE_HEADS,
            **_LOCAL_EXPERTS,
            **_SHORT_WINDOW,
            "rope_parameters": {**_YARN_ROPE, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
        note="attention sinks",
    ),
    _family("deepseek_v2", "DeepseekV2Config", _LATENT, note="latent attention, cached expanded"),
    _family("deepseek_v3", "DeepseekV3Config", _LATENT, note="latent attention, cached expanded"),
    _family("nemotron", "NemotronConfig", _WIDE_HEADS),
    _family("exaone4", "Exaone4Config", {**_SHORT_WINDOW, "sliding_window_pattern": 4}),
    _family("ernie4_5", "Ernie4_5Config"),
    _family(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    ),
    _family("hunyuan_dense", "HunYuanDenseV1Config", _WIDE_HEADS),
    _family("seed_oss", "SeedOssConfig", _WIDE_HEADS),
    _family("arcee", "ArceeConfig"),
    _family("apertus", "ApertusConfig"),
    _family("bitnet", "BitNetConfig"),
    _family("nanochat", "NanoChatConfig"),
    _family("helium", "HeliumConfig", _WIDE_HEADS),
    _family("dots1", "Dots1Config", {**_WIDE_HEADS, **_ROUTED_EXPERTS, "n_shared_experts": 1}),
    _family("minimax_m2", "MiniMaxM2Config", {**_WIDE_HEADS, **_LOCAL_EXPERTS}),
    _family(
        "llama4",
        "Llama4TextConfig",
        {
            **_WIDE_HEADS,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 1, 1, 0],
            "moe_layers": [1, 3],
        },
        refused="model.trace",
        note="counts tokens instead of reading positions",
    ),
    _family(
        "lfm2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"] * 2},
        refused=_MIXER,
        note="short convolutions",
    ),
    _family(
        "qwen3_next",
        "Qwen3NextConfig",
        {
            **_WIDE_HEADS,
            **_FEW_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        refused=_MIXER,
        note="linear attention",
    ),
    _family(
        "mamba",
        "MambaConfig",
        base={"vocab_size": _VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        refused=_MIXER,
        note="state space",
    ),
    _family(
        "jamba",
        "JambaConfig",
        {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False},
        refused=_MIXER,
        note="state space",
    ),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        {"num_local_experts": 0, "layer_types": ["attention"] * 4, "shared_intermediate_size": 96},
        note="attention layers only",
    ),
)


def family_named(name: str) -> Family:
    """The family of that name. Raises KeyError."""
    return next(family for family in FAMILIES if family.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one family in the last sweep: `python bench/trace/sweep.py` writes these.

    `status` is `supported` or `refused`, or `broken` where that was not what the table expects. `nodes` is
    the size of the traced graph of the four-layer configuration; `error` is the largest difference from
    transformers over the largest logit, in float32; `code` and `why` are those of a refusal.
    """

    name: str
    config: str
    status: str
    nodes: int | None
    layers: int | None
    error: float | None
    code: str | None
    note: str
    why: str = ""


def swept_families() -> tuple[Outcome, ...]:
    """The outcome of every family in the last sweep, in the order of the table."""
    text = resources.files(__package__ or "llmc.models").joinpath("families.json").read_text(encoding="utf-8")
    return tuple(Outcome(**row) for row in json.loads(text))
