"""Checkpoints that are quantised already: their codes arrive unchanged, by formulas written here anew."""

from __future__ import annotations

import json
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmc.compiler.bind import bind_checkpoint
from llmc.compiler.checkpoint import open_checkpoint
from llmc.compiler.trace import trace_config
from llmc.ir.rounded import round_rows
from llmc.passes.base import PassContext
from llmc.passes.bits import bits_per_weight
from llmc.passes.manager import run_passes
from llmc.passes.pipeline import canonicalise, fuse
from llmc.passes.probe import logits_of
from llmc.passes.quantize.keep_codes import KeepCodes
from llmc.spec.errors import ModelError
from llmc.spec.quant import parse_activation

GROUP, IDS = 16, [[3, 1, 4, 1, 5, 9, 2, 6, 5]]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def words(codes, bits):
    """Codes of each row packed into int32, one bit after the other."""
    rows, count = codes.shape
    out = torch.zeros(rows, -(-count * bits // 32), dtype=torch.int64)
    for index in range(count):
        for bit in range(bits):
            word, place = divmod(index * bits + bit, 32)
            out[:, word] |= ((codes[:, index].long() >> bit) & 1) << place
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def draw(low, high, *shape):
    return torch.randint(low, high, shape)


def scales_of(rows, groups, dtype=torch.float16):
    return (0.01 + 0.02 * torch.rand(rows, groups)).to(dtype)


def spread(per_group, width, size=GROUP):
    return per_group.float().repeat_interleave(size, 1)[:, :width]


# Each writer gives (stored tensors by short name, exact weight) of one [rows, width] linear.


def gptq(rows, width, *, bits=4, version=1, symmetric=False, act_order=False):
    groups, middle = width // GROUP, 1 << (bits - 1)
    codes, scales = draw(0, 1 << bits, rows, width), scales_of(rows, groups)
    zeros = torch.full((rows, groups), middle) if symmetric else draw(1, 1 << bits, rows, groups)
    g_idx = torch.arange(width) // GROUP
    if act_order:
        g_idx = g_idx[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
    exact = (codes - zeros[:, g_idx]).float() * scales.float()[:, g_idx]
    stored = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((zeros - (1 if version == 1 else 0)).T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }
    return stored, exact


def awq(rows, width):
    groups, order = width // GROUP, [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros, scales = draw(0, 16, rows, width), draw(0, 16, rows, groups), scales_of(rows, groups)

    def packed(values):  # [n, rows], eight columns a word
        shuffled = values.reshape(len(values), -1, 8)[:, :, order].flatten(1)
        return words(shuffled, 4)

    exact = (codes - spread(zeros, width)) * spread(scales, width)
    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.contiguous()}, exact


def packed(rows, width, *, bits=4, symmetric=True, dtype=torch.bfloat16):
    groups, middle = width // GROUP, 1 << (bits - 1)
    codes, scales = draw(0, 1 << bits, rows, width), scales_of(rows, groups, dtype)
    zeros = torch.full((rows, groups), middle) if symmetric else draw(0, 1 << bits, rows, groups)
    stored = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, width]),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return stored, (codes - spread(zeros, width)) * spread(scales, width)


def int8(rows, width):
    codes, scales = draw(-128, 128, rows, width), scales_of(rows, 1) / 16
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales.float()


def fp8_values(rows, width):
    return (torch.randn(rows, width) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_rows(rows, width):
    codes, scales = fp8_values(rows, width), torch.rand(rows, 1) / 1000
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def fp8_static(rows, width):
    codes, scale = fp8_values(rows, width), torch.rand(1) / 1000
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.05)}, codes.float() * scale


def fp8_blocks(rows, width, name="weight_scale_inv"):
    codes, scales = fp8_values(rows, width), torch.rand(-(-rows // 16), -(-width // 16)) / 1000
    exact = codes.float() * scales.repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :width]
    return {"weight": codes, name: scales}, exact


def gptq_config(**changes):
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False} | changes


def compressed(kind, weights, inputs=None):
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INTEGER = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
FORMS = {
    "gptq": (gptq, {}, gptq_config(), "int4_g16_asym", ""),
    "gptq_sym": (gptq, {"symmetric": True}, gptq_config(sym=True), "int4_g16", ""),
    "gptq_v2": (gptq, {"version": 2}, gptq_config(checkpoint_format="gptq_v2"), "int4_g16_asym", ""),
    "gptq_2": (gptq, {"bits": 2}, gptq_config(bits=2), "int3_g16_asym", ""),
    "gptq_3": (gptq, {"bits": 3}, gptq_config(bits=3), "int3_g16_asym", ""),
    "gptq_8": (gptq, {"bits": 8, "symmetric": True}, gptq_config(bits=8), "int8_g16", ""),
    "gptq_act": (gptq, {"act_order": True}, gptq_config(desc_act=True), "int4_g16_asym", ""),
    "awq": (
        awq,
        {},
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "int4_g16_asym",
        "",
    ),
    "packed": (packed, {}, compressed("pack-quantized", INTEGER), "int4_g16", ""),
    "packed_wide": (
        packed,
        {"dtype": torch.float32},
        compressed("pack-quantized", INTEGER),
        "int4_g16_sf32",
        "",
    ),
    "packed_asym": (
        packed,
        {"symmetric": False},
        compressed("pack-quantized", INTEGER | {"symmetric": False}),
        "int4_g16_asym",
        "",
    ),
    "packed_8": (
        packed,
        {"bits": 8},
        compressed("pack-quantized", INTEGER | {"num_bits": 8}),
        "int8_g16",
        "",
    ),
    "int8": (
        int8,
        {},
        compressed(
            "int-quantized", INTEGER | {"num_bits": 8, "strategy": "channel"}, TOKEN | {"type": "int"}
        ),
        "int8_channel",
        "int8_token",
    ),
    "fp8_rows": (
        fp8_rows,
        {},
        compressed("float-quantized", FLOAT, TOKEN | {"type": "float"}),
        "fp8_channel",
        "fp8_token",
    ),
    "fp8_static": (
        fp8_static,
        {},
        compressed(
            "float-quantized",
            FLOAT | {"strategy": "tensor"},
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
        ),
        "fp8_channel",
        "fp8_static",
    ),
    "fp8_blocks": (
        fp8_blocks,
        {},
        {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
        "fp8_b16x16",
        "fp8_g16",
    ),
}


def write(folder, kind, tensors, quantisation=None, **changes):
    folder.mkdir()
    config = AutoConfig.for_model(kind, **(SIZES | changes)).to_dict()
    if quantisation is not None:
        config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config, default=str))
    (folder / "tokenizer.json").write_text("{}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@cache
def stored_plainly(kind, changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | dict(changes))))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def plain_tensors(kind, changes):
    torch.manual_seed(1)
    return dict(stored_plainly(kind, changes))


@cache
def traced(kind, changes):
    config = AutoConfig.for_model(kind, **(SIZES | dict(changes)))
    return trace_config(config, dtype=torch.float32)


def pair(folder, form, kind="llama", **changes):
    """The same model twice: quantised, and with the exact values of its codes."""
    writer, options, quantisation, *_ = FORMS[form]
    dense, coded = plain_tensors(kind, tuple(changes.items())), {}
    for name, tensor in list(dense.items()):
        if not name.endswith("proj.weight"):
            coded[name] = tensor
            continue
        stored, exact = writer(*tensor.shape, **options)
        factor = (0.2 / exact.std()).item()
        dense[name], stored = rescaled(stored, exact, factor)
        coded |= {name.removesuffix("weight") + part: value for part, value in stored.items()}
    return (
        write(folder / "coded", kind, coded, quantisation, **changes),
        write(folder / "dense", kind, dense, **changes),
    )


def rescaled(stored, exact, factor):
    """Weights of a usual size: scales are multiplied with a power of two, which changes no code."""
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    names = [name for name in stored if name in ("scales", "weight_scale", "weight_scale_inv")]
    return exact.float() * power, stored | {name: stored[name] * power for name in names}


def bound(folder, kind="llama", **changes):
    return bind_checkpoint(traced(kind, tuple(changes.items())), open_checkpoint(folder))


def kept(program, **options):
    return run_passes(program, (*canonicalise(), *fuse(), KeepCodes(**options)), PassContext())


@pytest.mark.parametrize("form", FORMS)
def test_values_and_products_are_those_of_the_codes(form, tmp_path):
    coded, dense = (bound(folder) for folder in pair(tmp_path, form))
    for name in dense.weights:
        if name.endswith("proj.weight"):
            assert torch.equal(coded.weights.evaluate(name), dense.weights.evaluate(name)), name
    expected = logits_of(dense, IDS)
    done = kept(coded)
    record = done.history[-1]
    scheme, activation = FORMS[form][3:]
    assert record.matches == len(record.decisions) == 8
    assert all(decision.choice.startswith(scheme) for decision in record.decisions)
    plain = logits_of(kept(coded, round_inputs=False), IDS) if activation else logits_of(done, IDS)
    assert torch.allclose(plain, expected, rtol=1e-4, atol=1e-4)
    if activation:
        nodes = [node for node in done.graph.nodes if "quantized_linear" in str(node.target)]
        assert all(node.args[6] == activation for node in nodes)
        assert 1e-4 < (logits_of(done, IDS) - expected).abs().max() < 0.5 * expected.abs().max()
    assert bits_per_weight(done) < 0.75 * bits_per_weight(run_passes(dense, (), PassContext()))


def test_a_static_scale_is_used(tmp_path):
    coded, _ = pair(tmp_path, "fp8_static")
    done = kept(bound(coded))
    node = next(node for node in done.graph.nodes if "quantized_linear" in str(node.target))
    assert done.weights.evaluate(str(node.args[7].target)).item() == pytest.approx(0.05)
    x = torch.randn(3, 32) * 20
    assert round_rows(x, parse_activation("fp8_static"), torch.tensor([0.05])).abs().max() <= 448 * 0.0501


def test_experts_keep_their_codes(tmp_path):
    changes = MOE | {"head_dim": 8}
    folders = pair(tmp_path, "packed", "qwen3_moe", **changes)
    coded, dense = (bound(folder, "qwen3_moe", **changes) for folder in folders)
    done = kept(coded)
    assert sum("quantized_moe" in str(node.target) for node in done.graph.nodes) == 2
    assert torch.allclose(logits_of(done, IDS), logits_of(dense, IDS), rtol=1e-4, atol=1e-4)


def test_linears_with_inputs_in_different_orders_stay_apart(tmp_path):
    coded, _ = pair(tmp_path, "gptq_act")
    tensors = load_file(coded / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, coded / "model.safetensors")
    program = bound(coded)
    done = kept(program)
    assert any("codes of different kinds" in miss for record in done.history for miss in record.misses)
    assert torch.allclose(logits_of(done, IDS), logits_of(program, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "change", "told"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "already quantised (bitsandbytes)"),
        ("gptq", {"bits": 5}, "GPTQ codes of 5 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "settings of their own"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("packed", {"format": "marlin-24"}, "'marlin-24'"),
        ("packed", {"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ("packed", {"config_groups": {}}, "no config_groups"),
        ("fp8_blocks", {"fmt": "e5m2"}, "'e5m2'"),
        ("packed", {"quant_method": "mxfp4"}, "already quantised (mxfp4)"),
        ("packed", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "already quantised (modelopt)"),
        ("packed", {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ("packed", {"format": "mxfp4-pack-quantized"}, "'mxfp4-pack-quantized'"),
    ],
)
def test_what_cannot_be_read_is_named(form, change, told, tmp_path):
    coded, _ = pair(tmp_path, form)
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] |= change
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        open_checkpoint(coded)
    assert told in caught.value.what
    assert "--quant" in caught.value.fix


@pytest.mark.parametrize(
    ("form", "part", "damage", "code"),
    [
        ("gptq", "qzeros", None, "model.code_parts"),
        ("gptq", "qweight", lambda t: t[:-1], "model.code_shape"),
        ("gptq", "g_idx", lambda t: torch.zeros_like(t), "model.quantised_form"),
        ("packed", "weight_scale", lambda t: t[:, :1], "model.code_shape"),
        ("fp8_rows", "weight_scale", None, "model.code_parts"),
        ("int8", "weight", lambda t: t.to(torch.int16), "model.quantised_form"),
    ],
)
def test_damaged_codes_are_named(form, part, damage, code, tmp_path):
    coded, _ = pair(tmp_path, form)
    tensors = load_file(coded / "model.safetensors")
    name = f"model.layers.1.mlp.down_proj.{part}"
    if damage is None:
        del tensors[name]
    else:
        tensors[name] = damage(tensors[name]).contiguous()
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        bound(coded)
    assert caught.value.code == code
    assert "layers.1.mlp.down_proj" in caught.value.what
