"""Scheme names say everything about a scheme, and what is no scheme is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.spec.errors import RecipeError
from llmc.spec.quant import ActivationScheme, QuantScheme, codebook, parse_activation, parse_scheme

pytestmark = pytest.mark.pure

integers = st.builds(
    QuantScheme,
    bits=st.sampled_from((3, 4, 8)),
    group_size=st.sampled_from((0, 16, 32, 128)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
)
floats = st.builds(
    QuantScheme,
    bits=st.just(8),
    code_type=st.just("fp8"),
    group_size=st.sampled_from((0, 128)),
    scale_dtype=st.sampled_from(("bfloat16", "float32")),
)
blocks = st.builds(
    QuantScheme,
    bits=st.just(8),
    code_type=st.just("fp8"),
    group_size=st.sampled_from((64, 128)),
    block_rows=st.sampled_from((64, 128)),
    scale_dtype=st.just("float32"),
)
tables = st.builds(
    QuantScheme,
    bits=st.just(4),
    code_type=st.sampled_from(("nf4", "fp4")),
    group_size=st.sampled_from((0, 16, 64)),
    scale_dtype=st.sampled_from(("float16", "float8_e8m0fnu")),
)


@given(st.one_of(integers, floats, blocks, tables))
def test_a_scheme_is_its_name(scheme):
    assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("int4_g32", QuantScheme(bits=4, group_size=32)),
        ("int8_channel_asym", QuantScheme(bits=8, symmetric=False)),
        ("fp8_channel", QuantScheme(bits=8, code_type="fp8", scale_dtype="float32")),
        ("nf4_g64", QuantScheme(bits=4, code_type="nf4", group_size=64)),
        ("int4_g128_sbf16", QuantScheme(bits=4, group_size=128, scale_dtype="bfloat16")),
    ],
)
def test_names_as_documents_write_them(name, scheme):
    assert parse_scheme(name) == scheme
    assert scheme.name == name


@pytest.mark.parametrize(
    "name",
    ["int5_g32", "int4", "int4_g0", "fp3_g32", "nf8_g32", "fp8_channel_asym", "int4_g32_sint8", "Int4_g32"],
)
def test_other_names_are_refused(name):
    with pytest.raises(RecipeError, match="There is no quantisation scheme"):
        parse_scheme(name)


@given(
    st.builds(
        ActivationScheme,
        codes=st.sampled_from(("int8", "int16", "fp8")),
        group_size=st.sampled_from((0, 32, 64, 128)),
    )
)
def test_an_activation_scheme_is_its_name(scheme):
    assert parse_activation(scheme.name) == scheme


def test_no_activation_scheme_has_no_name():
    assert parse_activation("") is None
    assert parse_activation("fp8_static") == ActivationScheme(codes="fp8", static=True)


@pytest.mark.parametrize("name", ["int8", "int4_token", "int8_static", "int8_g0", "fp8_channel", "bf16"])
def test_other_activation_names_are_refused(name):
    with pytest.raises(RecipeError, match="There is no activation scheme"):
        parse_activation(name)


def test_codebooks_hold_zero_and_what_their_papers_say():
    assert codebook("int") == codebook("fp8") == ()
    nf4, fp4 = codebook("nf4"), codebook("fp4")
    assert len(nf4) == len(fp4) == 16
    assert list(nf4) == sorted(nf4)
    assert (nf4[0], nf4[7], nf4[15]) == (-1.0, 0.0, 1.0)
    assert fp4[:8] == tuple(sign * value for sign, value in zip([-1] * 8, fp4[8:], strict=True))
    assert max(fp4) == 6.0


def test_sizes_as_stored():
    block = parse_scheme("fp8_b128x64")
    assert (block.num_groups(130), block.num_scale_rows(130), block.padded_in_features(130)) == (3, 2, 130)
    table = parse_scheme("nf4_g64")
    assert (table.num_groups(130), table.num_scale_rows(130), table.padded_in_features(130)) == (3, 130, 192)
