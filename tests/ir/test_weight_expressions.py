"""Weight expressions: shapes and dtypes known beforehand are those of the values, and values are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmc.ir.quantized import dequantize_rows, quantize_rtn
from llmc.ir.weights import (
    Cast,
    Concat,
    Constant,
    Permute,
    Quantized,
    Reader,
    Reshape,
    Slice,
    Source,
    Stack,
    Unbound,
    WeightStore,
)
from llmc.spec.errors import InternalError, ModelError
from llmc.spec.quant import QuantScheme, parse_scheme


@st.composite
def expressions(draw, depth=3):
    """(expression, its value computed at once)"""
    if depth == 0 or draw(st.booleans()):
        shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
        seed = draw(st.integers(0, 999))
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return Constant(value), value
    of, value = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from(("slice", "concat", "stack", "permute", "reshape", "cast")))
    dim = draw(st.integers(0, value.dim() - 1))
    if kind == "slice":
        start = draw(st.integers(0, value.shape[dim] - 1))
        stop = draw(st.integers(start + 1, value.shape[dim]))
        return Slice(of, dim, start, stop), value.narrow(dim, start, stop - start)
    if kind == "concat":
        return Concat((of, of), dim), torch.cat((value, value), dim)
    if kind == "stack":
        return Stack((of, of, of)), torch.stack((value,) * 3)
    if kind == "permute":
        dims = tuple(draw(st.permutations(range(value.dim()))))
        return Permute(of, dims), value.permute(dims)
    if kind == "reshape":
        return Reshape(of, (value.numel(), 1)), value.reshape(-1, 1)
    return Cast(of, torch.bfloat16), value.to(torch.bfloat16)


@given(expressions())
def test_expressions_mean_what_torch_means(pair):
    expr, expected = pair
    found = expr.evaluate(Reader())
    assert expr.shape == tuple(found.shape) == tuple(expected.shape)
    assert expr.dtype == found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["int4_g32", "int8_channel", "int3_g64_asym"])
@pytest.mark.parametrize("shape", [(6, 100), (3, 5, 70)])
def test_quantised_parts_have_the_shapes_they_promise(name, shape):
    scheme = parse_scheme(name)
    weight = torch.randn(shape)
    whole = quantize_rtn(weight.reshape(-1, shape[-1]), scheme)
    for part in ("codes", "scales", "zeros"):
        if part == "zeros" and scheme.symmetric:
            continue
        expr = Quantized(Constant(weight), scheme, part)
        found = expr.evaluate(Reader())
        assert (expr.shape, expr.dtype) == (tuple(found.shape), found.dtype)
        assert torch.equal(found.reshape(-1, found.shape[-1]), getattr(whole, part))


@pytest.mark.parametrize("scheme", ["int4_g32", "int8_channel_asym"])
def test_working_in_bands_changes_nothing(monkeypatch, scheme):
    weight, scheme = torch.randn(50, 40), parse_scheme(scheme)
    whole = quantize_rtn(weight, scheme)
    values = dequantize_rows(*whole, scheme, 40)
    monkeypatch.setattr("llmc.ir.bands.BAND_VALUES", 7 * 40)
    for part, expected in zip(("codes", "scales", "zeros"), whole, strict=True):
        if expected is not None:
            found = Quantized(Constant(weight), scheme, part).evaluate(Reader())
            assert torch.equal(found, expected)
    assert torch.equal(dequantize_rows(*whole, scheme, 40), values)


def test_a_weight_is_read_once_for_all_its_parts():
    class Counted:
        shape, dtype, reads = (8, 32), torch.float32, 0

        def evaluate(self, reader):
            self.reads += 1
            return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.reads))

    one, other, reader = Counted(), Counted(), Reader()
    four, eight = QuantScheme(bits=4, group_size=32), QuantScheme(bits=8, group_size=32)
    codes, scales = (Quantized(one, four, part).evaluate(reader) for part in ("codes", "scales"))
    expected = quantize_rtn(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), four)
    assert one.reads == 1
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales, expected.scales)
    assert Quantized(one, eight, "codes").evaluate(reader).shape == (8, 32)
    Quantized(other, eight, "codes").evaluate(reader)
    assert (one.reads, other.reads) == (2, 1)


def test_sources_read_files_and_refuse_other_shapes(tmp_path):
    path = str(tmp_path / "model.safetensors")
    value = torch.randn(4, 3)
    save_file({"a": value}, path)
    reader = Reader()
    assert torch.equal(Source(path, "a", (4, 3), torch.float32).evaluate(reader), value)
    with pytest.raises(ModelError, match=r"'a' in model.safetensors has shape \[4, 3\]") as caught:
        Source(path, "a", (3, 4), torch.float32).evaluate(reader)
    assert "needs [3, 4]" in caught.value.why
    reader.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("place", [0, 7, 41])
def test_a_stored_tensor_that_holds_no_numbers_is_named(tmp_path, dtype, place):
    """Wherever in it the value lies, and however it is read; its neighbours in the file are not."""
    path = str(tmp_path / "model.safetensors")
    value = torch.randn(6, 7)
    broken = value.clone()
    broken.view(-1)[place] = torch.nan if dtype == "float8_e4m3fn" else -torch.inf
    kind = getattr(torch, dtype)
    save_file({"good": value.to(kind), "bad": broken.to(kind), "codes": torch.arange(9)}, path)
    reader = Reader()
    for name, shape, stored in (("good", (6, 7), kind), ("codes", (9,), torch.int64)):
        Source(path, name, shape, stored).evaluate(reader)
    with pytest.raises(ModelError, match=r"'bad' in model.safetensors") as caught:
        Slice(Source(path, "bad", (6, 7), kind), 0, 0, 1).evaluate(reader)
    assert caught.value.code == "model.not_finite"
    assert caught.value.why.startswith("1 of its 42 values")
    reader.close()


def test_values_that_the_compute_dtype_cannot_hold_are_refused(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({"a": torch.tensor([1.0, 7e4])}, path)
    source, reader = Source(path, "a", (2,), torch.float32), Reader()
    with pytest.raises(ModelError, match="Values of a do not fit float16") as caught:
        Cast(source, torch.float16).evaluate(reader)
    assert caught.value.code == "model.overflow"
    assert "65504" in caught.value.why
    assert Cast(source, torch.bfloat16).evaluate(reader).isfinite().all()
    masked = Constant(torch.tensor([0.0, -torch.inf]))
    assert Cast(masked, torch.float16).evaluate(reader).tolist() == [0.0, -torch.inf]
    reader.close()


def test_what_is_not_bound_has_no_values():
    with pytest.raises(InternalError, match="'w' has no values"):
        Unbound("w", (2, 2), torch.float32).evaluate(Reader())


def test_stores_are_immutable_and_keep_ties_of_what_they_keep():
    one, two = Constant(torch.zeros(2, 3)), Constant(torch.zeros(4, dtype=torch.bfloat16))
    store = WeightStore({"one": one, "two": two}, {"alias": "one", "other": "two"})
    assert (store.num_bytes("one"), store.total_bytes) == (24, 32)
    grown = store.with_entries({"three": two})
    assert list(store) == ["one", "two"]
    assert list(grown) == ["one", "two", "three"]
    kept = grown.restricted_to(["one", "three", "absent"])
    assert list(kept) == ["one", "three"]
    assert kept.ties == {"alias": "one"}
    assert kept["one"] is one
