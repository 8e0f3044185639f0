"""What the exported format can hold, word by word; joins undone by names and shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.compiler.export.config import quantisation_config, with_dtype
from llmc.compiler.export.form import form_of, pack_words
from llmc.compiler.export.places import Layout, Piece, Place, places_of
from llmc.compiler.export.shards import ShardWriter
from llmc.compiler.quantised.compressed import read_compressed
from llmc.compiler.quantised.unpacking import unpack_words
from llmc.compiler.shards import list_tensors
from llmc.ir.quantized import QTensor, pack_codes
from llmc.ir.weights import Cast, Concat, Permute, Source, Stack
from llmc.spec.errors import InternalError, UsageError
from llmc.spec.quant import parse_scheme


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_packed_words_are_read_back(rows, count, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=generator)
    words = pack_words(codes, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    assert torch.equal(unpack_words(words.long() & 0xFFFFFFFF, bits, count), codes.to(torch.uint8))


def test_words_hold_the_first_code_in_their_lowest_bits():
    assert pack_words(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 15]]), 4).tolist() == [[0x321 - (1 << 28)]]


@pytest.mark.parametrize(
    ("scheme", "activation", "width", "kind"),
    [
        ("int4_g32", "", 64, "pack-quantized"),
        ("int8_channel", "", 64, "pack-quantized"),
        ("int4_g128_asym", "", 256, "pack-quantized"),
        ("int8_channel", "int8_token", 64, "int-quantized"),
        ("fp8_channel", "", 64, "float-quantized"),
        ("fp8_channel", "fp8_static", 64, "float-quantized"),
        ("fp8_b128x128", "fp8_g128", 256, "float-quantized"),
    ],
)
def test_forms_are_those_that_are_read(scheme, activation, width, kind):
    form = form_of("a.weight", scheme, activation, width)
    assert form.kind == kind
    (group,) = read_compressed(quantisation_config({"a": form}, [])).groups
    parsed = parse_scheme(scheme)
    assert (group.bits, group.symmetric, group.activation) == (parsed.bits, parsed.symmetric, activation)
    assert group.block == ((128, 128) if parsed.block_rows else None)
    assert max(group.group_size, 0) == (0 if parsed.block_rows else parsed.group_size)


@pytest.mark.parametrize(
    ("scheme", "activation", "width", "what", "nearest"),
    [
        ("nf4_g64", "", 64, "nf4_g64", "int4_g64"),
        ("fp4_g32", "", 64, "fp4_g32", "int4_g32"),
        ("int4_g32", "", 80, "80 columns in groups of 32", "group_size=0"),
        ("int4_g128", "", 192, "192 columns in groups of 128", "group_size=64"),
        ("int8_g32", "int8_g32", 64, "inputs of int8_g32", "int8_channel and int8_token"),
        ("int4_channel", "int8_token", 64, "int4_channel and inputs of int8_token", "int8_channel"),
        ("fp8_g32", "", 64, "fp8_g32", "fp8_channel"),
        ("fp8_channel", "int8_token", 64, "inputs of int8_token", "fp8_token"),
        ("int4_g32_se8m0", "", 64, "int4_g32_se8m0", "float16 scales"),
    ],
)
def test_what_has_no_form_is_refused_with_the_nearest(scheme, activation, width, what, nearest):
    with pytest.raises(UsageError) as caught:
        form_of("a.b.weight", scheme, activation, width)
    assert caught.value.code == "export.form"
    assert "'a.b.weight'" in caught.value.what
    assert what in caught.value.what
    assert nearest in caught.value.fix


def test_three_bits_become_four_with_the_same_values():
    scheme = parse_scheme("int3_g32_asym")
    codes, zeros = torch.randint(0, 8, (8, 32)), torch.randint(0, 8, (8, 1), dtype=torch.uint8)
    stored = QTensor(pack_codes(codes, scheme), torch.ones(8, 1, dtype=torch.float16), zeros)
    made = form_of("a.weight", scheme.name, "", 64).tensors(stored, 32, None)
    assert torch.equal(unpack_words(made["weight_packed"].long() & 0xFFFFFFFF, 4, 32), codes.to(torch.uint8))
    words = made["weight_zero_point"].T.long() & 0xFFFFFFFF
    assert torch.equal(unpack_words(words, 4, 8).T, zeros)


def source(key, *shape):
    return Source("file", key, shape, torch.float32)


def test_stacks_and_joins_of_experts_are_undone():
    gates = Stack((source("e.0.gate", 2, 4), source("e.1.gate", 2, 4)))
    ups = Stack((source("e.0.up", 2, 4), source("e.1.up", 2, 4)))
    places = places_of(Cast(Concat((gates, ups), 1), torch.bfloat16))
    assert places is not None
    assert [(place.key, place.matrix, place.start, place.stop) for place in places] == [
        ("e.0.gate", 0, 0, 2),
        ("e.1.gate", 1, 0, 2),
        ("e.0.up", 0, 2, 4),
        ("e.1.up", 1, 2, 4),
    ]
    assert places_of(Permute(source("w", 2, 4), (1, 0))) is None


def layout(**shapes):
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    places = {name: [Place(name, None, 0, shape[0])] for name, shape in named.items()}
    return Layout(places, named, frozenset({"rope.inv_freq"}))


def test_joined_names_are_taken_apart_and_padding_is_dropped():
    known = layout(m__q__weight=(4, 8), m__k__weight=(2, 8), m__q__bias=(4,))
    weight = known.pieces("m.q+k.weight")
    assert weight is not None
    assert [(piece.key, piece.ranges) for piece in weight] == [
        ("m.q.weight", ((0, 4),)),
        ("m.k.weight", ((4, 6),)),
    ]
    bias = known.pieces("m.q+k.bias")
    assert bias is not None
    assert [(piece.key, piece.ranges) for piece in bias] == [("m.q.bias", ((0, 4),)), ("", ((4, 6),))]
    assert known.pieces("m.q+v.weight") is None
    assert known.pieces("m.q.weight.t") is None
    assert known.is_computed("rope.inv_freq.mul")


def test_swapped_halves_are_put_back():
    pieces = layout(m__gate_up__weight=(4, 1)).pieces("m.gate_up.weight.gate_first")
    assert pieces is not None
    found = pieces[0].of(torch.tensor([[2], [3], [0], [1]]))
    assert found is not None
    assert found.flatten().tolist() == [0, 1, 2, 3]


def test_blocks_of_rows_are_not_cut_through():
    scales = torch.arange(3)[:, None]
    tail, middle = Piece("b", "b", None, ((128, 300),)), Piece("a", "a", None, ((64, 128),))
    found = tail.of(scales, 128)
    assert found is not None
    assert found.flatten().tolist() == [1, 2]
    assert middle.of(scales, 128) is None


def test_shards_are_bounded_and_indexed(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=100)
    for name in ("a", "b", "c"):
        writer.add(name, torch.full((15,), ord(name)).float())
    with pytest.raises(InternalError):
        writer.add("a", torch.zeros(1))
    writer.close()
    assert set(list_tensors(tmp_path)) == {"a", "b", "c"}
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-{index}-of-00003.safetensors" for index in ("00001", "00002", "00003")
    ]


def test_the_config_says_what_the_values_are_stored_in():
    found = with_dtype({"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}}, "float32")
    assert found == {"dtype": "float32", "text_config": {"torch_dtype": "float32", "n": 1}}
    assert with_dtype({}, "float16") == {"torch_dtype": "float16"}
