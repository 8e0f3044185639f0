"""Reference operators against plain float64 formulas, and their schemas and fakes against themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from llmc.ir.ops.activation import ACTIVATIONS
from llmc.ir.ops.linear import ROW_TILE
from llmc.ir.quantized import dequantize_rows, quantize_rtn
from llmc.spec.quant import parse_scheme

llmc = torch.ops.llmc
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype):
    scale = max(1.0, float(expected.abs().max()))
    return bool((found.double() - expected).abs().max() <= TOLERANCE[dtype] * scale)


# -- norms --------------------------------------------------------------------------------------------


def obvious_norm(x, weight, bias, eps, offset, centred):
    x = x.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    out = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.double() + offset)
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["cast_then_scale", "scale_then_cast"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms(dtype, style, offset, eps):
    x, weight, bias = (
        randn(3, 4, 24, dtype=dtype),
        randn(24, seed=1, dtype=dtype),
        randn(24, seed=2, dtype=dtype),
    )
    found = llmc.rms_norm(x, weight, eps, offset, style)
    assert found.dtype == dtype
    assert close(found, obvious_norm(x, weight, None, eps, offset, False), dtype)
    found = llmc.layer_norm(x, weight, bias, eps, offset, style)
    assert close(found, obvious_norm(x, weight, bias, eps, offset, True), dtype)
    residual = randn(3, 4, 24, seed=3, dtype=dtype)
    normed, total = llmc.add_rms_norm(x, residual, weight, eps, offset, style)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, llmc.rms_norm(total, weight, eps, offset, style))
    normed, total = llmc.add_layer_norm(x, residual, weight, bias, eps, offset, style)
    assert torch.equal(normed, llmc.layer_norm(total, weight, bias, eps, offset, style))


def test_norms_without_weights_and_the_point_of_casting():
    x = randn(2, 16, dtype=torch.bfloat16)
    assert close(
        llmc.rms_norm(x, None, 1e-6, 0.0, "cast_then_scale"),
        obvious_norm(x, None, None, 1e-6, 0.0, False),
        torch.bfloat16,
    )
    assert llmc.layer_norm(x, None, None, 1e-6, 0.0, "scale_then_cast").dtype == torch.bfloat16
    weight = randn(16, seed=1, dtype=torch.bfloat16)
    styles = [llmc.rms_norm(x, weight, 1e-6, 0.0, style) for style in ("cast_then_scale", "scale_then_cast")]
    assert not torch.equal(*styles)
    wide = llmc.rms_norm(x, weight.float(), 1e-6, 0.0, "cast_then_scale")
    assert wide.dtype == torch.float32


# -- rope ---------------------------------------------------------------------------------------------


def obvious_rope(x, positions, freq, scale, style, tail):
    """One pair at a time, in float64."""
    x, width = x.double(), 2 * len(freq)
    out = x.clone()
    base = x.shape[-1] - width if tail else 0
    half = len(freq)
    for token, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(freq.tolist()):
            cos, sin = math.cos(position * frequency) * scale, math.sin(position * frequency) * scale
            read = (pair, pair + half) if style == "half" else (2 * pair, 2 * pair + 1)
            write = (2 * pair, 2 * pair + 1) if style == "interleaved" else (pair, pair + half)
            first, second = x[token, :, base + read[0]], x[token, :, base + read[1]]
            out[token, :, base + write[0]] = first * cos - second * sin
            out[token, :, base + write[1]] = second * cos + first * sin
    return out


@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("width", "pairs"), [(8, 4), (12, 3), (80, 16)])
def test_rope_styles(style, tail, width, pairs):
    x, positions = randn(5, 3, width), torch.tensor([0, 1, 7, 300, 4000])
    freq = 10000.0 ** (-torch.arange(pairs) / pairs)
    found = llmc.rope(x, positions, freq, 1.25, style, tail)
    # float32 angles near 4000 are right to about 2e-4
    assert (found.double() - obvious_rope(x, positions, freq, 1.25, style, tail)).abs().max() < 2e-3
    near = positions < 10
    expected = obvious_rope(x[near], positions[near], freq, 1.25, style, tail)
    assert torch.allclose(found[near].double(), expected, atol=1e-5)


def test_rope_keeps_what_it_does_not_rotate_and_the_norm_of_what_it_does():
    x, positions, freq = randn(4, 2, 10), torch.arange(4), torch.tensor([1.0, 0.3])
    front = llmc.rope(x, positions, freq, 1.0, "half", False)
    assert torch.equal(front[..., 4:], x[..., 4:])
    back = llmc.rope(x, positions, freq, 1.0, "half", True)
    assert torch.equal(back[..., :6], x[..., :6])
    assert torch.allclose(front.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(front[0], x[0])


# -- products and tables ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, ROW_TILE, ROW_TILE + 1, 70])
def test_linear(dtype, rows):
    x, weight, bias = (
        randn(rows, 24, dtype=dtype),
        randn(7, 24, seed=1, dtype=dtype),
        randn(7, seed=2, dtype=dtype),
    )
    found = llmc.linear(x, weight, bias)
    assert found.shape == (rows, 7)
    if rows:
        assert close(found, x.double() @ weight.double().T + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_does_not_know_its_batch(dtype):
    x, weight = randn(75, 40, dtype=dtype), randn(33, 40, seed=1, dtype=dtype)
    whole = llmc.linear(x, weight, None)
    for start, stop in ((0, 1), (31, 34), (70, 75)):
        assert torch.equal(llmc.linear(x[start:stop], weight, None), whole[start:stop])
    assert torch.equal(llmc.linear(x.reshape(5, 15, 40), weight, None).reshape(75, 33), whole)


@pytest.mark.parametrize("name", ["int8_g32", "int4_g32", "int4_g128_asym", "int3_channel"])
def test_quantised_products_and_tables(name):
    scheme = parse_scheme(name)
    weight, x, bias = randn(9, 50), randn(4, 50, seed=1), randn(9, seed=2)
    parts = quantize_rtn(weight, scheme)
    exact = dequantize_rows(*parts, scheme, 50)
    assert torch.equal(llmc.quantized_linear(x, *parts, bias, name), llmc.linear(x, exact, bias))
    ids = torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(llmc.quantized_embedding(ids, *parts, name, 50, "float32"), exact[ids])
    assert llmc.quantized_embedding(ids, *parts, name, 50, "bfloat16").dtype == torch.bfloat16
    assert torch.equal(llmc.embedding(ids, weight), weight[ids])
    assert torch.equal(llmc.gather_rows(weight, torch.tensor([2, 2])), weight[[2, 2]])


# -- activations and experts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations(name):
    gate, up = randn(3, 10), randn(3, 10, seed=1)
    x = gate.double()
    plain = {
        "silu": x * torch.sigmoid(x),
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "identity": x,
    }
    assert set(plain) == set(ACTIVATIONS)
    found = llmc.gated_activation(gate, up, name)
    assert close(found, plain[name] * up.double(), torch.float32)
    assert torch.allclose(llmc.gated_activation_packed(torch.cat((gate, up), -1), name), found, atol=1e-6)


def test_softcap():
    x = torch.tensor([-1e9, -1.0, 0.0, 30.0])
    assert torch.allclose(llmc.softcap(x, 30.0), 30 * torch.tanh(x / 30))


def obvious_moe(x, ids, weights, gate_up, down, biases, act):
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            hidden = gate_up[expert].double() @ x[token].double() + biases[0][expert].double()
            out[token] += weight * (down[expert].double() @ act(hidden) + biases[1][expert].double())
    return out


def silu(x):
    return x * torch.sigmoid(x)


def halves(hidden):
    return hidden.chunk(2)


def alternate(hidden):
    return hidden[0::2], hidden[1::2]


def clamped(hidden):
    gate, up = alternate(hidden)
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


EXPERTS = {
    "silu": (2, "silu", False, lambda h: silu(halves(h)[0]) * halves(h)[1]),
    "interleaved": (2, "silu", True, lambda h: silu(alternate(h)[0]) * alternate(h)[1]),
    "clamped": (2, "clamped_swiglu", True, clamped),
    "plain": (1, "plain:relu2", False, lambda h: h.clamp(min=0) ** 2),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts(name):
    columns, activation, interleaved, act = EXPERTS[name]
    x, weights = randn(40, 16), torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:3] for i in range(40)])
    gate_up, down = randn(5, columns * 12, 16, seed=2), randn(5, 16, 12, seed=3)
    biases = randn(5, columns * 12, seed=4), randn(5, 16, seed=5)
    settings = (activation, interleaved, 1.7, 0.7)
    found = llmc.moe(x, ids, weights, gate_up, down, *biases, *settings)
    assert close(found, obvious_moe(x, ids, weights, gate_up, down, biases, act), torch.float32)
    assert torch.equal(
        llmc.moe(x[7:9], ids[7:9], weights[7:9], gate_up, down, *biases, *settings), found[7:9]
    )

    schemes = [parse_scheme("int4_channel"), parse_scheme("int8_g32_asym")]
    stacks, exact = [], []
    for stack, scheme in zip((gate_up, down), schemes, strict=True):
        parts = [quantize_rtn(expert, scheme) for expert in stack]
        stacked = [torch.stack(part) if part[0] is not None else None for part in zip(*parts, strict=True)]
        stacks.extend(stacked)
        exact.append(torch.stack([dequantize_rows(*part, scheme, stack.shape[2]) for part in parts]))
    names = [scheme.name for scheme in schemes]
    quantised = llmc.quantized_moe(x, ids, weights, *stacks, *biases, *settings, *names)
    assert torch.equal(quantised, llmc.moe(x, ids, weights, *exact, *biases, *settings))


# -- schemas and fakes --------------------------------------------------------------------------------


def samples():
    x, ids = randn(5, 16), torch.tensor([0, 1, 2, 0, 1])
    weight, norm = randn(8, 16), randn(16)
    parts = quantize_rtn(weight, parse_scheme("int4_channel"))
    q, k = randn(5, 4, 8), randn(5, 2, 8)
    caches = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    coded = tuple(cache.to(torch.int8) for cache in caches)
    cache_scales = torch.ones(2, 4, 2), torch.ones(2, 4, 2)
    freq = torch.tensor([1.0, 0.1])
    paged = (*caches, torch.empty(0), torch.tensor([[0, 1]]), torch.tensor([0, 5]), torch.arange(5))
    experts = ids[:, None] % 2, torch.rand(5, 1), randn(2, 12, 16), randn(2, 16, 6), None, None
    stacks = [
        torch.stack(part) if part[0] is not None else None
        for stack in (experts[2], experts[3])
        for part in zip(*[quantize_rtn(e, parse_scheme("int8_channel")) for e in stack], strict=True)
    ]
    rotation = (torch.arange(5), freq, 1.0, "half", False)
    return {
        "rms_norm": (x, norm, 1e-5, 0.0, "cast_then_scale"),
        "layer_norm": (x, norm, norm, 1e-5, 0.0, "scale_then_cast"),
        "add_rms_norm": (x, x, norm, 1e-5, 0.0, "cast_then_scale"),
        "add_layer_norm": (x, x, norm, None, 1e-5, 0.0, "cast_then_scale"),
        "linear": (x, weight, None),
        "quantized_linear": (x, *parts, None, "int4_channel", "fp8_static", torch.tensor([0.1])),
        "embedding": (ids, weight),
        "quantized_embedding": (ids, *parts, "int4_channel", 16, "bfloat16"),
        "gather_rows": (x, ids),
        "gated_activation": (x, x, "silu"),
        "gated_activation_packed": (x, "silu"),
        "softcap": (x, 30.0),
        "rope": (q, *rotation),
        "attention": (q, k, k, torch.arange(5), None, 0, 0, 1.0, 0, 0.0, 0),
        "kv_write": (k, k, *coded, torch.arange(5), *cache_scales),
        "paged_attention": (q, *coded, *paged[2:], None, 1.0, 0, 0.0, 0, *cache_scales),
        "rope_kv_write": (q, k, k, *rotation, *caches, torch.arange(5)),
        "moe": (x, *experts, "silu", False, 1.0, 0.0),
        "quantized_moe": (
            x,
            *experts[:2],
            *stacks,
            None,
            None,
            "silu",
            False,
            1.0,
            0.0,
            "int8_channel",
            "int8_channel",
            "int8_g32",
        ),
    }


@pytest.mark.parametrize("name", sorted(samples()))
def test_schemas_and_fakes(name):
    """The schema tells the truth about mutation and aliases, and the fake about shapes and dtypes."""
    overload = getattr(llmc, name).default
    opcheck(overload, samples()[name], test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_a_sample():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("llmc::")]
    assert {name.split("::")[1].split(".")[0] for name in names} == set(samples())
