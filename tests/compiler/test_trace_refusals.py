"""What cannot be compiled right is refused, by name, before it can be wrong."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from llmc.compiler.hf.adapter import config_of
from llmc.compiler.hf.masks import MaskSpec, mask_spec
from llmc.compiler.trace import trace_config
from llmc.models.families import family_named
from llmc.spec.errors import ModelError


def config_for(name, **changes):
    family = family_named(name)
    return config_of(family.config, {**family.options, **changes})


def refusal(config, **options):
    with pytest.raises(ModelError) as caught:
        trace_config(config, dtype=torch.float32, **options)
    return caught.value


def with_attention(monkeypatch, **passed):
    """Let Llama's attention hand more arguments to the attention function."""
    original = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **{**kwargs, **passed})

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def test_unknown_attention_argument(monkeypatch):
    with_attention(monkeypatch, position_bias=torch.zeros(1))
    error = refusal(config_for("llama"))
    assert error.code == "model.attention_argument"
    assert "position_bias" in error.what


def test_harmless_and_absent_arguments_pass(monkeypatch):
    with_attention(monkeypatch, position_bias=None, output_attentions=False)
    trace_config(config_for("llama"), dtype=torch.float32)


def test_attention_that_looks_ahead(monkeypatch):
    with_attention(monkeypatch, is_causal=False)
    assert refusal(config_for("llama")).code == "model.attention_argument"


def test_window_that_contradicts_the_mask(monkeypatch):
    with_attention(monkeypatch, sliding_window=5)
    original = masking_utils.create_sliding_window_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", original)
    config = config_for("llama")
    config.sliding_window = 8
    error = refusal(config)
    assert error.code == "model.attention_argument"
    assert "5" in error.what
    assert "8" in error.what


def test_mask_given_as_a_tensor(monkeypatch):
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: torch.zeros(1, 1, 1, 1))
    error = refusal(config_for("llama"))
    assert error.code == "model.attention_mask"
    assert "Tensor" in error.what


def test_layer_without_attention(monkeypatch):
    original = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        if self.self_attn.layer_idx == 2:
            return hidden_states
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    error = refusal(config_for("llama"))
    assert error.code == "model.attention_count"
    assert "[0, 1, 3]" in error.why


def test_model_that_writes_to_its_buffers(monkeypatch):
    original = modeling_llama.LlamaMLP.__init__

    def init(self, config):
        original(self, config)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        return self.down_proj(self.gate_proj(x)) + self.seen

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    error = refusal(config_for("llama"))
    assert error.code == "model.mutated_buffer"
    assert "model.layers.0.mlp.seen" in error.what


def test_convolution_hidden_in_a_known_family(monkeypatch):
    original = modeling_llama.LlamaMLP.__init__

    def init(self, config):
        original(self, config)
        self.mix = torch.nn.Conv1d(4, 4, 3)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    error = refusal(config_for("llama"))
    assert error.code == "model.mixer"
    assert "Conv1d at model.layers.0.mlp.mix" in error.what


def test_model_that_depends_on_values():
    config = config_for("llama")
    original = modeling_llama.LlamaMLP.forward

    def forward(self, x):
        return original(self, x) if x.sum() > 0 else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", forward)
        error = refusal(config)
    assert error.code == "model.trace"
    assert "torch.export says" in error.why


def test_quantised_checkpoint():
    config = config_for("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    error = refusal(config)
    assert error.code == "model.quantized_checkpoint"
    assert "gptq" in error.what


def test_multimodal_wrapper():
    error = refusal(transformers.Gemma3Config())
    assert error.code == "model.multimodal"


def test_config_without_a_causal_model():
    error = refusal(transformers.T5Config())
    assert error.code == "model.unknown_type"
    assert "t5" in error.what


def test_config_that_no_model_fits():
    error = refusal(config_for("llama", hidden_act="does-not-exist"))
    assert error.code == "model.construct"
    assert "does-not-exist" in error.why


@pytest.mark.parametrize("wanted", [0, -3, 257])
def test_context_beyond_the_positions(wanted):
    error = refusal(config_for("llama"), max_context=wanted)
    assert error.code == "model.context"
    assert str(wanted) in error.what
    assert "256" in error.why


def test_yarn_extends_the_context():
    config = config_for("llama-yarn", max_position_embeddings=64)
    assert trace_config(config, dtype=torch.float32, max_context=256).spec.max_context == 256
    assert refusal(config, max_context=257).code == "model.context"


@pytest.mark.parametrize("context", [8, 16, 17, 256])
def test_longrope_is_chosen_by_the_longest_context_and_recorded(context):
    config = config_for("phi3-longrope")
    program = trace_config(config, dtype=torch.float32, max_context=context)
    factors = config.rope_parameters["long_factor" if context > 16 else "short_factor"]
    expected = 1.0 / (torch.tensor(factors) * 10000.0 ** (torch.arange(0, 16, 2) / 16))
    assert torch.allclose(program.weights["model.rotary_emb.inv_freq"].value, expected)
    kind = "long" if context > 16 else "short"
    assert program.spec.choices["longrope"].startswith(f"{kind} factors: max_context {context}")


def mask(function):
    return mask_spec(mask_function=function)


def test_masks_are_read_from_what_builds_them():
    assert mask(masking_utils.causal_mask_function) == MaskSpec()
    assert mask(masking_utils.sliding_window_causal_mask_function(7)) == MaskSpec(window=7)
    chunked = masking_utils.chunked_causal_mask_function(6, torch.zeros(1))
    assert mask(chunked) == MaskSpec(chunk=6)
    packed = masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(torch.zeros(1, 4)),
        masking_utils.sliding_window_causal_mask_function(3),
    )
    assert mask(packed) == MaskSpec(window=3)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function),
        masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: q == k),
        masking_utils.sliding_window_overlay(4),
    ],
    ids=["bidirectional", "or", "unknown", "not causal"],
)
def test_unknown_masks_are_refused(function):
    with pytest.raises(ModelError) as caught:
        mask(function)
    assert caught.value.code == "model.attention_mask"
