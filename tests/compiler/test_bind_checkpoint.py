"""Every stored tensor arrives where transformers would put it, or the error names it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.ir.program import TRACE_INPUTS, Program
from llmc.ir.weights import Cast, Concat, Constant, Source, Stack, Unbound, WeightStore
from llmc.spec.errors import ModelError
from llmc.spec.model import ModelSpec

WIDTHS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": ("llama", UNTIED),
    "llama-tied": ("llama", TIED),
    "qwen2": ("qwen2", TIED),
    "qwen3": ("qwen3", UNTIED),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2} | TIED),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "pad_token_id": 0}),
    "phi3": ("phi3", {"pad_token_id": 0} | UNTIED),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}


def random_model(family):
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**WIDTHS, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def unbound_program(model):
    """A program whose weights are the model's state dict by shape alone, ties declared as traces do."""
    owners, ties, entries = {}, {}, {}
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if id(tensor) in owners:
            ties[name] = owners[id(tensor)]
            continue
        owners[id(tensor)] = name
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        shape = tuple(tensor.shape)
        entries[name] = (
            Unbound(name, shape, torch.float32) if is_parameter else Constant(torch.zeros_like(tensor))
        )
    entries["computed_table"] = Constant(torch.arange(3.0))
    spec = ModelSpec(
        family="",
        architecture="",
        num_layers=0,
        hidden_size=0,
        vocab_size=0,
        max_context=0,
        compute_dtype="float32",
        tied_head=bool(ties),
        num_parameters=0,
        attention=(),
    )
    return Program(graph=fx.Graph(), inputs=TRACE_INPUTS, weights=WeightStore(entries, ties), spec=spec)


def assert_bound(program, model):
    state = model.state_dict()
    for name in program.weights:
        if name != "computed_table":
            torch.testing.assert_close(program.weights.evaluate(name), state[name], rtol=0, atol=0, msg=name)
    assert torch.equal(program.weights.evaluate("computed_table"), torch.arange(3.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["one file", "sharded"])
def test_bound_tensors_equal_the_models_state_dict(family, layout, tmp_path):
    model = random_model(family)
    options = {"max_shard_size": "20KB"} if layout == "sharded" else {}
    checkpoint = open_checkpoint(save(model, tmp_path, **options))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (layout == "sharded")
    assert_bound(bind_checkpoint(unbound_program(model), checkpoint), model)


def test_experts_stored_one_by_one_are_stacked_lazily(tmp_path):
    model = random_model("mixtral")
    checkpoint = open_checkpoint(save(model, tmp_path))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in checkpoint.tensors
    bound = bind_checkpoint(unbound_program(model), checkpoint)
    gate_up = bound.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(gate_up, Concat)
    assert all(isinstance(part, Stack) and isinstance(part.parts[0], Source) for part in gate_up.parts)


def test_weights_are_cast_to_the_traced_dtype(tmp_path):
    model = random_model("qwen3").to(torch.bfloat16)
    program = unbound_program(model)
    bound = bind_checkpoint(program, open_checkpoint(save(model, tmp_path)))
    name = "model.embed_tokens.weight"
    assert isinstance(bound.weights[name], Cast)
    assert bound.weights.evaluate(name).dtype == torch.float32
    assert torch.equal(bound.weights.evaluate(name), model.state_dict()[name].float())


def test_a_checkpoint_of_the_base_model_binds_to_the_model_with_a_head(tmp_path):
    model = random_model("llama-tied")
    save(model.model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "embed_tokens.weight" in stored
    assert_bound(bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path)), model)


def rewrite(folder, change):
    """Apply `change` to the dict of stored tensors of a one-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def failure(family, tmp_path, change):
    model = random_model(family)
    save(model, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path))
    return caught.value


def test_a_tie_stored_under_its_other_name_is_bound(tmp_path):
    model = random_model("llama-tied")
    save(model, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_bound(bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path)), model)


def test_a_tie_stored_twice_must_agree(tmp_path):
    model = random_model("llama-tied")
    save(model, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_bound(bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path)), model)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' differ"):
        bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path):
    def narrow(tensors):
        tensors["model.norm.weight"] = torch.ones(31)

    error = failure("llama", tmp_path, narrow)
    assert error.code == "model.tensor_shape"
    assert "'model.norm.weight' has shape [31]" in error.what
    assert "[32]" in error.why


def test_a_missing_expert_shows_as_a_shape(tmp_path):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    error = failure("qwen3_moe", tmp_path, lambda tensors: tensors.pop(name))
    assert "'model.layers.1.mlp.experts.down_proj' has shape [3, 32, 24]" in error.what
    assert "[4, 32, 24]" in error.why


def test_missing_tensors_are_named_and_counted(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if "layers.1.mlp" in name]:
            tensors["other." + name] = tensors.pop(name)

    error = failure("llama", tmp_path, drop)
    assert error.code == "model.missing_tensors"
    assert error.what.startswith("3 of the model's 21 tensors are missing: model.layers.1.mlp.")
    assert "3 that the model does not know" in error.why


def test_unexpected_tensors_are_named_and_counted(tmp_path):
    extra = {f"model.layers.2.mlp.{part}.weight": torch.ones(2) for part in ("a", "b")}
    error = failure("llama", tmp_path, lambda tensors: tensors.update(extra))
    assert error.code == "model.unexpected_tensors"
    assert "2 tensors" in error.what
    assert "model.layers.2.mlp.a.weight" in error.what


def test_tables_that_older_versions_stored_are_no_strangers(tmp_path):
    model = random_model("gpt2")
    save(model, tmp_path)
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(old))
    assert_bound(bind_checkpoint(unbound_program(model), open_checkpoint(tmp_path)), model)
    llama = random_model("llama")
    folder = tmp_path / "llama"
    save(llama, folder)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(folder, lambda tensors: tensors.update(frequencies))
    assert_bound(bind_checkpoint(unbound_program(llama), open_checkpoint(folder)), llama)


def test_fewer_layers_in_the_config_than_in_the_weights_is_an_error(tmp_path):
    model = random_model("llama")
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ModelError, match="9 tensors of the checkpoint belong to nothing"):
        bind_checkpoint(unbound_program(small), open_checkpoint(tmp_path))
