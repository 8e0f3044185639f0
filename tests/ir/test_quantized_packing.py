"""Codes are packed and unpacked without loss, and rounding is as near as a scheme allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.quantized import (
    dequantize_rows,
    pack_codes,
    part_dtype,
    part_shape,
    quantize_rtn,
    take_rows,
    unpack_codes,
)
from llmc.ir.weights import quantize_in_bands
from llmc.spec.quant import QuantScheme, codebook, parse_scheme


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from((3, 4, 8)),
    group_size=st.sampled_from((0, 32, 64, 128)),
    symmetric=st.booleans(),
)


def code_range(scheme):
    if scheme.symmetric:
        return -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    return 0, (1 << scheme.bits) - 1


@given(scheme=schemes, rows=st.integers(1, 4), width=st.integers(1, 200), seed=st.integers(0, 99))
def test_packing_is_a_bijection(scheme, rows, width, seed):
    low, high = code_range(scheme)
    codes = torch.randint(low, high + 1, (rows, width), generator=torch.Generator().manual_seed(seed))
    stored = pack_codes(codes, scheme)
    padded = scheme.padded_in_features(width)
    assert stored.shape == (rows, padded if scheme.bits == 8 else padded // 2)
    assert stored.dtype == (torch.int8 if scheme.bits == 8 and scheme.symmetric else torch.uint8)
    back = unpack_codes(stored, scheme)
    assert torch.equal(back[:, :width].long(), codes)
    assert not back[:, width:].any()


@given(
    scheme=schemes,
    rows=st.integers(1, 4),
    width=st.integers(1, 200),
    exponent=st.integers(-4, 4),
    seed=st.integers(0, 99),
)
def test_rounding_is_within_half_a_step(scheme, rows, width, exponent, seed):
    """Half a step, but for values that clamp: one symmetric side ends a step early."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    found = quantize_rtn(weight, scheme)
    back = dequantize_rows(found.codes, found.scales, found.zeros, scheme, width)
    size = scheme.group_size or width
    steps = found.scales.float().abs().repeat_interleave(size, dim=1)[:, :width]
    allowed = steps * (1.0 if scheme.symmetric else 0.5)
    stored_exactly = steps * 2**-10 * (1 << scheme.bits)  # what rounding the scale to float16 moves
    tiny = torch.finfo(torch.float16).smallest_normal * (1 << scheme.bits)
    assert ((back - weight).abs() <= allowed + stored_exactly + tiny).all()


def obvious(weight, scheme):
    """Element by element, as the definition says."""
    low, high = code_range(scheme)
    size = scheme.group_size or weight.shape[1]
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].double()
            if scheme.symmetric:
                scale = (group[group.abs().argmax()] / low).half().double()
                zero = 0.0
            else:
                bottom, top = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
                scale = torch.tensor((top - bottom) / high).half().double()
                zero = 0.0 if scale == 0 else (-bottom / scale).round().clamp(0, high).item()
            scale = scale if scale != 0 else torch.tensor(1.0).double()
            codes = (group / scale + zero).round().clamp(low, high)
            out[row, start : start + size] = ((codes - zero) * scale).float()
    return out


@pytest.mark.parametrize("name", ["int4_g32", "int8_g64", "int3_channel", "int4_g32_asym", "int3_g64_asym"])
def test_codes_are_those_of_the_definition(name):
    scheme = parse_scheme(name)
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    found = quantize_rtn(weight, scheme)
    back = dequantize_rows(found.codes, found.scales, found.zeros, scheme, 100)
    assert torch.allclose(back, obvious(weight, scheme), rtol=1e-6, atol=0)


def test_the_largest_value_takes_the_lowest_code():
    for sign in (1, -1):
        weight = sign * torch.tensor([[4.0, -1.0, 0.5, 2.0]])
        found = quantize_rtn(weight, parse_scheme("int4_channel"))
        assert unpack_codes(found.codes, parse_scheme("int4_channel"))[0, 0] == -8
        assert found.scales.item() == -sign * 0.5


@pytest.mark.parametrize("name", ["int4_g32", "int8_channel", "int4_g32_asym"])
def test_zeros_stay_zeros(name):
    scheme = parse_scheme(name)
    weight = torch.zeros(2, 40)
    weight[1] = torch.linspace(0, 1, 40)
    found = quantize_rtn(weight, scheme)
    back = dequantize_rows(found.codes, found.scales, found.zeros, scheme, 40)
    assert not back[0].any()
    assert back[1, 0] == 0
    assert found.scales.isfinite().all()


def test_values_beyond_the_scale_dtype_saturate_and_stay_finite():
    scheme = parse_scheme("int4_channel")
    found = quantize_rtn(torch.full((1, 4), 1e9), scheme)
    assert dequantize_rows(found.codes, found.scales, None, scheme, 4).isfinite().all()


# -- floating-point codes, tables and blocks ----------------------------------------------------------

OTHERS = ["fp8_channel", "fp8_g32_sbf16", "fp8_b16x32", "nf4_g32", "fp4_g32", "fp4_g32_se8m0", "int8_b16x32"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 64), (37, 75), (3, 33)])
def test_parts_have_the_shapes_and_dtypes_announced(name, rows, width):
    scheme = parse_scheme(name)
    found = quantize_rtn(randn(rows, width), scheme)
    for part in ("codes", "scales"):
        tensor = getattr(found, part)
        assert tuple(tensor.shape) == part_shape((rows, width), scheme, part)
        assert tensor.dtype == part_dtype(scheme, part)
    again = pack_codes(unpack_codes(found.codes, scheme), scheme)
    assert torch.equal(again.view(torch.uint8), found.codes.view(torch.uint8))


def nearest(value, scheme):
    """The value of a code type nearest to a scaled weight, by trying all."""
    if scheme.code_type == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        values = values[values.isfinite()]
    elif scheme.code_type == "int":
        values = torch.arange(-128, 128).double()
    else:
        values = torch.tensor(codebook(scheme.code_type)).double()
    return values[(values - value).abs().argmin()].item()


@pytest.mark.parametrize("name", OTHERS)
def test_codes_are_the_nearest_there_are(name):
    scheme, rows, width = parse_scheme(name), 18, 40
    weight = randn(rows, width) * 0.02
    found = quantize_rtn(weight, scheme)
    back = dequantize_rows(found.codes, found.scales, None, scheme, width)
    size, height = scheme.group_size or width, scheme.block_rows or 1
    for row in range(rows):
        for column in range(width):
            scale = found.scales[row // height, column // size].double().item()
            scaled = weight[row, column].double().item() / scale
            distance = abs(back[row, column].item() / scale - scaled)
            assert distance <= abs(nearest(scaled, scheme) - scaled) + 1e-6 * (1 + abs(scaled))


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_saturates_and_the_largest_value_is_kept(name):
    scheme = parse_scheme(name)
    weight = randn(32, 64) * 3
    found = quantize_rtn(weight, scheme)
    back = dequantize_rows(found.codes, found.scales, None, scheme, 64)
    at = weight.abs().argmax()
    allowed = 0.5 if "e8m0" in name else 0.005
    assert abs(back.flatten()[at] / weight.flatten()[at] - 1) <= allowed
    assert (back - weight).abs().max() <= 0.3 * weight.abs().max()


@pytest.mark.parametrize("name", [*OTHERS, "int4_g32_asym"])
def test_rows_taken_one_by_one_are_those_of_the_whole(name):
    scheme = parse_scheme(name)
    found = quantize_rtn(randn(40, 70), scheme)
    whole = dequantize_rows(*found, scheme, 70)
    ids = torch.tensor([39, 0, 17, 17])
    assert torch.equal(take_rows(*found, scheme, ids, 70), whole[ids])


@pytest.mark.parametrize("name", ["fp8_b16x32", "int4_g32"])
def test_stacked_matrices_are_quantised_one_by_one(name):
    scheme = parse_scheme(name)
    stack = randn(3, 40, 70)
    whole = quantize_in_bands(stack, scheme)
    for part in ("codes", "scales"):
        apart = [getattr(quantize_rtn(matrix, scheme), part) for matrix in stack]
        assert torch.equal(getattr(whole, part).float(), torch.cat(apart).float())
