"""Mixtures of experts against the reference operator: every form of activation, plain and coded experts, more
experts than pairs, all pairs at one expert; and that a token's bits do not depend on its company."""

from __future__ import annotations

import pytest
import torch

from llmc.ir import ops
from llmc.ir.quantized import quantize_rtn
from llmc.kernels.cuda.packing import pack_words
from llmc.spec.quant import parse_scheme

assert ops
BF16, F32 = torch.bfloat16, torch.float32


def close(found, expected, tolerance):
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.double().abs().max(), float(error)


def routed(tokens, choices, experts):
    ids = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
    return ids, torch.rand(tokens, choices)


@pytest.mark.parametrize(
    ("activation", "interleaved", "dtype"),
    [("silu", False, BF16), ("clamped_swiglu", True, F32), ("plain:relu2", False, F32)],
)
def test_mixture(operators, activation, interleaved, dtype):
    tokens, choices, experts, width, inner = 5, 2, 7, 64, 48
    columns = inner if activation.startswith("plain:") else 2 * inner
    x = torch.randn(tokens, width).to(dtype)
    ids, weights = routed(tokens, choices, experts)
    ids[:, 0] = torch.where((ids == 3).any(1), ids[:, 0], 3)
    gate_up = torch.randn(experts, columns, width).to(dtype) / 8
    down = torch.randn(experts, width, inner).to(dtype) / 8
    biases = (torch.randn(experts, columns).to(dtype), torch.randn(experts, width).to(dtype))
    settings = (gate_up, down, *biases, activation, interleaved, 1.7, 7.0)
    expected = torch.ops.llmc.moe(x, ids, weights, *settings)
    close(operators.moe(x, ids, weights, *settings), expected, 2e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("scheme", ["int4_g32", "int4_g32_asym", "int8_g32"])
def test_mixture_of_coded_experts(operators, scheme):
    parsed = parse_scheme(scheme)
    tokens, choices, experts, width, inner = 3, 2, 4, 64, 96
    x = torch.randn(tokens, width)
    ids, weights = routed(tokens, choices, experts)
    both, stored = [], []
    for shape in ((experts * 2 * inner, width), (experts * width, inner)):
        codes = quantize_rtn(torch.randn(*shape) / 8, parsed)
        parts = [None if part is None else part.unflatten(0, (experts, -1)) for part in codes]
        both += parts
        stored += [pack_words(codes.codes) if parsed.bits < 8 else parts[0], *parts[1:]]
    settings = (None, None, "silu", False, 0.0, 0.0, scheme, scheme)
    expected = torch.ops.llmc.quantized_moe(x, ids, weights, *both, *settings)
    close(operators.quantized_moe(x, ids, weights, *stored, *settings), expected, 1e-5)


def test_a_tokens_bits_do_not_depend_on_its_company(operators):
    x = torch.randn(70, 32).to(BF16)
    ids, weights = routed(70, 2, 4)
    gate_up, down = torch.randn(4, 32, 32).to(BF16), torch.randn(4, 32, 16).to(BF16)
    settings = (gate_up, down, None, None, "silu", False, 0.0, 0.0)
    whole = operators.moe(x, ids, weights, *settings)
    for first, last in ((0, 1), (30, 47)):
        part = slice(first, last)
        assert torch.equal(operators.moe(x[part], ids[part], weights[part], *settings), whole[part])
