"""The program that tracing makes: any number of tokens, weights by name, facts of the model."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

from llmc.compiler.hf.adapter import config_of
from llmc.compiler.trace import trace_config
from llmc.ir.interpret import interpret
from llmc.ir.printer import print_program
from llmc.ir.verify import verify
from llmc.ir.weights import Constant, Unbound
from llmc.models.families import family_named

ATTENTION = torch.ops.llmc.attention.default


def config_for(name, **changes):
    family = family_named(name)
    return config_of(family.config, {**family.options, **changes})


@functools.cache
def traced(name, dtype=torch.float32, **changes):
    return trace_config(config_for(name, **changes), dtype=dtype)


def eager_model(config):
    torch.manual_seed(3)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(program, state, ids, positions, rows):
    def weight(name):
        expr = program.weights[name]
        return state[name] if isinstance(expr, Unbound) else program.weights.evaluate(name)

    return interpret(program.graph, {"input_ids": ids, "positions": positions, "out_rows": rows}, weight)


@pytest.mark.parametrize("name", ["llama", "qwen2-swa", "gpt_oss", "gpt2"])
def test_one_program_serves_any_number_of_tokens(name):
    changes = {"n_positions" if name == "gpt2" else "max_position_embeddings": 512}
    program, model = traced(name, **changes), eager_model(config_for(name, **changes))
    for count in (1, 2, 13, 300):
        ids = torch.randint(0, 97, (count,))
        with torch.no_grad():
            expected = model(input_ids=ids[None], use_cache=False).logits[0]
        found = run(program, model.state_dict(), ids, torch.arange(count), torch.arange(count))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_are_chosen_and_sequences_kept_apart():
    program, model = traced("mistral"), eager_model(config_for("mistral"))
    first, second = torch.randint(0, 97, (11,)), torch.randint(0, 97, (19,))
    with torch.no_grad():
        expected = torch.stack(
            [model(input_ids=second[None]).logits[0, 18], model(input_ids=first[None]).logits[0, 4]]
        )
    found = run(
        program,
        model.state_dict(),
        torch.cat((first, second)),
        torch.cat((torch.arange(11), torch.arange(19))),
        torch.tensor([29, 4]),
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_weights_carry_state_dict_names_and_ties_have_one_owner():
    config = config_for("llama3")
    program = trace_config(config, dtype=torch.bfloat16)
    unbound = {name for name in program.weights if isinstance(program.weights[name], Unbound)}
    state = transformers.LlamaForCausalLM(config).state_dict()
    assert unbound == set(state) - {"lm_head.weight"}
    assert program.weights.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert program.spec.tied_head
    assert all(program.weights[name].shape == tuple(state[name].shape) for name in unbound)
    assert all(program.weights[name].dtype == torch.bfloat16 for name in unbound)


def test_frequencies_are_real_and_stay_float32():
    program = traced("llama3", torch.bfloat16)
    constants = [program.weights[name] for name in program.weights if name.endswith("inv_freq")]
    assert len(constants) == 1
    assert isinstance(constants[0], Constant)
    assert constants[0].dtype == torch.float32
    plain = traced("llama").weights["model.rotary_emb.inv_freq"]
    assert not torch.equal(plain.value, constants[0].value)  # llama3 scaling is baked in


def test_buffers_that_checkpoints_hold_are_left_to_the_checkpoint():
    program = traced("deepseek_v3")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert isinstance(program.weights[bias], Unbound)


def test_nothing_of_the_exporter_is_left():
    for name in ("qwen3_moe", "deepseek_v2", "gemma3n"):
        program = traced(name)
        verify(program)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        leftovers = ("assert", "detach", "alias", "contiguous", "clone", "_to_copy", "empty", "copy.default")
        assert not [target for target in targets if any(part in target for part in leftovers)]
        devices = {
            arg
            for node in program.graph.nodes
            for arg in (*node.args, *node.kwargs.values())
            if isinstance(arg, torch.device)
        }
        assert devices <= {torch.device("cpu")}


def test_spec_states_what_each_layer_sees():
    spec = traced("gemma2", final_logit_softcapping=30.0).spec
    assert [layer.window for layer in spec.attention] == [8, 0, 8, 0]
    assert {layer.softcap for layer in spec.attention} == {50.0}
    assert all((layer.num_heads, layer.num_kv_heads) == (4, 2) for layer in spec.attention)
    assert (spec.family, spec.architecture) == ("gemma2", "Gemma2ForCausalLM")
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.max_context) == (4, 64, 97, 256)
    assert (spec.bos_token_ids, spec.eos_token_ids, spec.pad_token_id) == ((1,), (2,), 0)


def test_windows_that_only_the_mask_holds_are_seen():
    assert {layer.window for layer in traced("phimoe").spec.attention} == {8}
    assert [layer.window for layer in traced("qwen2-swa").spec.attention] == [0, 0, 8, 8]


def test_sinks_and_widths_are_seen():
    assert all(layer.has_sinks for layer in traced("gpt_oss").spec.attention)
    latent = traced("deepseek_v3").spec.attention[0]
    assert (latent.qk_dim, latent.v_dim) == (24, 16)
    assert [layer.qk_dim for layer in traced("gemma4").spec.attention] == [16, 32, 16, 32]


def test_layers_that_share_a_cache_name_its_owner():
    for name, changes in (("gemma3n", {}), ("gemma4", {"num_kv_shared_layers": 2})):
        program = traced(name, **changes)
        assert [layer.kv_source for layer in program.spec.attention] == [0, 1, 0, 1]
        nodes = [node for node in program.graph.nodes if node.target is ATTENTION]
        assert [node.args[6] for node in nodes] == [0, 1, 0, 1]
        names = [name for name in program.weights if "layers.2" in name or "layers.3" in name]
        assert not [name for name in names if "k_proj" in name or "v_proj" in name]


def test_parameters_are_counted_once():
    config = config_for("llama3")
    model = transformers.LlamaForCausalLM(config)
    assert traced("llama3").spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_tracing_leaves_transformers_as_it_was():
    registry = transformers.AttentionInterface
    before = set(registry._global_mapping)
    config = config_for("llama")
    text = config.to_json_string()
    trace_config(config, dtype=torch.float32)
    assert set(registry._global_mapping) == before
    assert config.to_json_string() == text
    model = transformers.LlamaForCausalLM(config)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_tracing_twice_gives_the_same_program():
    again = trace_config(config_for("qwen3_moe"), dtype=torch.float32)
    assert print_program(again) == print_program(traced("qwen3_moe"))
