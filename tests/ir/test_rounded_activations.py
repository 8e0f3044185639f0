"""Rounded activations equal the definition, element by element, and products take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.quantized import dequantize_rows, quantize_rtn
from llmc.ir.rounded import round_rows, rounded_input
from llmc.spec.quant import parse_activation, parse_scheme

llmc = torch.ops.llmc


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def obvious(row, name):
    """One row in float32 scalars, as kernels compute it."""
    scheme = parse_activation(name)
    size = scheme.group_size or len(row)
    out = np.empty(len(row), np.float32)
    for start in range(0, len(row), size):
        group = row[start : start + size].numpy()
        top = np.abs(group).max()
        if not np.isfinite(top):
            out[start : start + size] = np.nan
        elif top < 1e-30:
            out[start : start + size] = 0
        else:
            scale = top / np.float32(scheme.top)
            if scheme.codes == "fp8":
                codes = (
                    torch.from_numpy(group / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
                )
            else:
                codes = np.rint(group * (np.float32(scheme.top) / top))
            out[start : start + size] = codes * scale
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    "name", ["int8_token", "int8_g32", "int8_g128", "int16_g32", "int16_token", "fp8_token", "fp8_g64"]
)
@given(width=st.integers(1, 200), exponent=st.integers(-40, 30), seed=st.integers(0, 99))
def test_rows_are_rounded_as_defined(name, width, exponent, seed):
    x = randn(3, width, seed=seed) * 10.0**exponent
    x[1, 0] = 0.0
    found = round_rows(x, parse_activation(name))
    for row, expected in zip(found, x, strict=True):
        assert torch.equal(row, obvious(expected, name))


@pytest.mark.parametrize(("name", "steps"), [("int8_g32", 127), ("int16_g32", 32512)])
def test_rounding_moves_at_most_half_a_step(name, steps):
    x = randn(8, 96)
    moved = (round_rows(x, parse_activation(name)) - x).abs().unflatten(1, (3, 32))
    top = x.unflatten(1, (3, 32)).abs().amax(2, keepdim=True)
    assert (moved <= 0.5001 * top / steps).all()
    assert moved.max() > 0.4 * top.min() / steps


def test_a_row_that_is_not_finite_says_so_and_leaves_others_alone():
    x = randn(3, 64)
    x[1, 40] = torch.inf
    found = round_rows(x, parse_activation("int8_g32"))
    assert found[1, 32:].isnan().all()
    assert torch.equal(found[[0, 2]], round_rows(x[[0, 2]], parse_activation("int8_g32")))
    assert found[1, :32].isfinite().all()


def test_a_static_scale_saturates_and_is_used_as_it_is():
    x = torch.tensor([[0.1, -3.0, 1000.0, 44.8]])
    found = round_rows(x, parse_activation("fp8_static"), torch.tensor([0.1]))
    assert torch.allclose(found, torch.tensor([[0.1, -3.0, 44.8, 44.8]]), rtol=0.07)
    assert found.abs().max() <= 44.81


def test_without_a_scheme_the_input_is_the_same_tensor():
    x = randn(2, 3)
    assert rounded_input(x, "") is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8_g32", "int8_token", "fp8_token"])
def test_products_take_rounded_rows_and_round_once(name, dtype):
    scheme = parse_scheme("int4_g32")
    weight, x, bias = randn(9, 70), randn(5, 70, seed=1).to(dtype), randn(9, seed=2).to(dtype)
    parts = quantize_rtn(weight, scheme)
    rows = round_rows(x, parse_activation(name)).double()
    exact = dequantize_rows(*parts, scheme, 70).double()
    found = llmc.quantized_linear(x, *parts, bias, scheme.name, name)
    assert found.dtype == dtype
    assert torch.allclose(
        found.double(),
        rows @ exact.T + bias.double(),
        rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-5,
    )


def test_experts_take_rounded_rows():
    scheme = parse_scheme("int8_channel")
    x, ids, weights = randn(6, 32), torch.arange(6)[:, None] % 2, torch.ones(6, 1)
    stacks, dense = [], []
    for size, seed in (((24, 32), 1), ((32, 12), 2)):
        parts = [quantize_rtn(randn(*size, seed=seed + 10 * expert), scheme) for expert in range(2)]
        stacks += [
            torch.stack([part.codes for part in parts]),
            torch.stack([part.scales for part in parts]),
            None,
        ]
        dense.append([dequantize_rows(*part, scheme, size[1]) for part in parts])
    settings = (None, None, "silu", False, 1.0, 0.0, scheme.name, scheme.name)
    found = llmc.quantized_moe(x, ids, weights, *stacks, *settings, "int8_token")
    plain = llmc.quantized_moe(x, ids, weights, *stacks, *settings)
    for token in range(6):
        gate_up, down = (part[token % 2] for part in dense)
        rows = round_rows(x[token], parse_activation("int8_token"))
        gate, up = (gate_up @ rows).chunk(2)
        hidden = round_rows(torch.nn.functional.silu(gate) * up, parse_activation("int8_token"))
        assert torch.allclose(found[token], down @ hidden, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)
