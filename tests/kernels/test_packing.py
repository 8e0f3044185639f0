"""Packed layouts are bijections of the portable packing, and what layout.hpp draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.kernels.catalog import IntegerLinear, allocated_bytes, float_linear, integer_linear
from llmc.kernels.packing import Codes, Layout, layout_of, pack, pack_float, unpack, unpack_float
from llmc.spec.errors import TargetError
from llmc.spec.quant import QuantScheme, parse_scheme

pytestmark = pytest.mark.pure

SCHEMES = st.builds(
    QuantScheme,
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([0, 32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
)


def random_matrix(scheme, num_rows, in_features, seed):
    rng = np.random.default_rng(seed)
    low = -(1 << (scheme.bits - 1)) if scheme.symmetric else 0
    codes = np.zeros((num_rows, scheme.padded_in_features(in_features)), dtype=np.int16)
    codes[:, :in_features] = rng.integers(low, low + (1 << scheme.bits), (num_rows, in_features))
    groups = scheme.num_groups(in_features)
    scales = rng.standard_normal((num_rows, groups)).astype(np.float16)
    zeros = rng.integers(0, 1 << scheme.bits, (num_rows, groups), dtype=np.uint8)
    return portable(codes, scheme), scales, None if scheme.symmetric else zeros


def portable(codes, scheme):
    if scheme.bits == 8:
        return codes.astype(np.int8 if scheme.symmetric else np.uint8)
    stored = codes + (1 << (scheme.bits - 1)) if scheme.symmetric else codes
    return (stored[:, 0::2] | (stored[:, 1::2] << 4)).astype(np.uint8)


@given(SCHEMES, st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(scheme, num_rows, in_features, seed):
    matrix = Codes(*random_matrix(scheme, num_rows, in_features, seed))
    packed = pack(matrix, scheme, in_features)
    assert packed.dtype == np.uint8
    assert packed.size == layout_of(scheme).num_bytes(num_rows, in_features)
    again = unpack(packed, scheme, num_rows, in_features)
    np.testing.assert_array_equal(again.codes, matrix.codes, strict=True)
    np.testing.assert_array_equal(again.scales, matrix.scales, strict=True)
    assert (again.zeros is None) == scheme.symmetric
    if matrix.zeros is not None:
        np.testing.assert_array_equal(again.zeros, matrix.zeros, strict=True)


@given(
    st.sampled_from([np.float32, np.float16, np.uint16]),
    st.integers(1, 70),
    st.integers(1, 50),
    st.integers(0, 2**32 - 1),
)
def test_unpack_float_is_the_inverse_of_pack_float(dtype, num_rows, width, seed):
    bits = np.random.default_rng(seed).integers(0, 256, num_rows * width * np.dtype(dtype).itemsize, np.uint8)
    weight = bits.view(dtype).reshape(num_rows, width)
    packed = pack_float(weight)
    name = {4: "float32", 2: "float16"}[weight.dtype.itemsize]
    assert packed.size == float_linear(name).num_bytes(num_rows, width)
    again = unpack_float(packed, np.dtype(dtype), (num_rows, width))
    np.testing.assert_array_equal(again.view(np.uint8), weight.view(np.uint8))


def test_four_bit_codes_lie_where_the_drawing_says():
    scheme = parse_scheme("int4_g32")
    codes = np.zeros((40, 64), dtype=np.int16)
    codes[21, 32 + 13] = 5  # tile 0, group 1, half 1, dword 5; k8 = 1, place 5: high nibble of byte 1
    scales = np.arange(80, dtype=np.float16).reshape(40, 2)
    packed = pack(Codes(portable(codes, scheme), scales, None), scheme, 64)
    record = packed[576:1152]
    assert record[:64].view(np.float16)[21] == 43
    expected = np.full(512, 0x88, dtype=np.uint8)
    expected[(1 * 2 + 1) * 64 + 5 * 4 + 1] = 0xD8
    np.testing.assert_array_equal(record[64:], expected)
    assert not packed[1152 + 16 : 1152 + 64].any()  # scales of rows that do not exist


def test_eight_bit_codes_and_zeros_lie_where_the_drawing_says():
    scheme = parse_scheme("int8_g32_asym")
    codes = np.zeros((32, 32), dtype=np.int16)
    codes[7, 30] = 200  # half 0, dword 7, k4 = 7, byte 2
    zeros = np.arange(32, dtype=np.uint8)[:, None]
    packed = pack(Codes(portable(codes, scheme), np.ones((32, 1), np.float16), zeros), scheme, 32)
    np.testing.assert_array_equal(packed[64:96], np.arange(32))
    assert np.flatnonzero(packed[96:]).tolist() == [7 * 128 + 7 * 4 + 2]
    assert packed[96 + 7 * 128 + 7 * 4 + 2] == 200


def test_bfloat16_pairs_lie_where_the_drawing_says():
    weight = np.arange(33 * 3, dtype=np.uint16).reshape(33, 3)
    tiles = pack_float(weight).view(np.uint16).reshape(2, 2, 2, 16, 2)
    assert tiles[0, 1, 1, 4].tolist() == [weight[20, 2], 0]
    assert tiles[1, 0, 0, 0].tolist() == [weight[32, 0], weight[32, 1]]


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (QuantScheme(bits=4, group_size=48), "multiples of 32"),
        (QuantScheme(bits=4, group_size=32, scale_dtype="bfloat16"), "float16 scales"),
    ],
)
def test_a_scheme_without_layout_is_refused(scheme, why):
    with pytest.raises(TargetError, match=why):
        layout_of(scheme)


def test_layout_names_and_sizes():
    assert layout_of(parse_scheme("int4_g96")) == Layout(bits=4, group=32, zeros=False)
    assert layout_of(parse_scheme("int8_channel_asym")).name == "w8t32_g128_zeros"
    assert layout_of(parse_scheme("int4_g32")).num_bytes(33, 33) == 4 * 576
    assert allocated_bytes(100) == 128 + 8192


def test_the_catalog_names_the_product_in_cpp():
    fast = integer_linear(parse_scheme("int4_g128"), activation_group=32)
    assert fast.scheme_type == "llmc::Scheme<4, 128, 32, 1, false>"
    accurate = integer_linear(parse_scheme("int8_g32_asym"), limbs=2)
    assert accurate == IntegerLinear(
        layout=Layout(bits=8, group=32, zeros=True), limbs=2, activation_group=32
    )
    with pytest.raises(TargetError, match="groups of 48"):
        integer_linear(parse_scheme("int4_g32"), activation_group=48)
    with pytest.raises(TargetError, match="float8"):
        float_linear("float8_e4m3fn")
