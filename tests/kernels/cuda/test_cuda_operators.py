"""Every CUDA operator against the reference operator on the same inputs, over edge shapes."""

from __future__ import annotations

import os

import pytest
import torch

from llmc.ir import ops
from llmc.ir.quantized import quantize_rtn
from llmc.kernels.cuda.packing import pack_words, unpack_words
from llmc.spec.quant import parse_scheme

assert ops
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(hash(request.node.name) % 2**31)


def close(found, expected, tolerance=None):
    """Relative to the largest value: a few roundings of the result's dtype, or `tolerance`."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.isfinite(found.float()).all()
    bound = tolerance or (2e-2 if found.dtype == BF16 else 2e-5)
    error = (found.double() - expected.double()).abs().max()
    assert error <= bound * expected.double().abs().max().clamp_min(1e-6), float(error)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (5, 70, 96), (33, 130, 40), (130, 48, 64)])
def test_linear(operators, m, n, k, dtype):
    x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    close(operators.linear(x, weight, None), torch.nn.functional.linear(x.float(), weight.float()).to(dtype))
    close(operators.linear(x, weight, bias), torch.ops.llmc.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "scheme",
    [
        "int4_g32",
        "int4_g32_asym",
        "int4_g64_asym",
        "int4_g128_asym",
        "int3_g32",
        "int4_channel",
        "int8_g32",
        "fp8_channel",
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 256), (20, 33, 160)])
def test_quantized_linear_and_embedding(operators, scheme, m, n, k, dtype):
    parsed = parse_scheme(scheme)
    codes = quantize_rtn(torch.randn(n, k), parsed)
    stored = codes.codes if parsed.bits == 8 else pack_words(codes.codes)
    x = torch.randn(m, k).to(dtype)
    found = operators.quantized_linear(x, stored, codes.scales, codes.zeros, None, scheme)
    expected = torch.ops.llmc.quantized_linear(x.float(), *codes, None, scheme).to(dtype)
    close(found, expected)
    if parsed.code_type == "fp8":
        return
    ids = torch.randint(0, n, (7,))
    rows = operators.quantized_embedding(ids, stored, codes.scales, codes.zeros, scheme, k, dtype)
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(rows, torch.ops.llmc.quantized_embedding(ids, *codes, scheme, k, name))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        ("int8_channel", "int8_token"),
        ("int8_g32", "int8_token"),
        ("fp8_channel", "fp8_token"),
        ("fp8_channel", "fp8_static"),
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 256), (19, 33, 160)])
def test_products_with_rounded_rows(operators, scheme, activation, m, n, k, dtype):
    codes = quantize_rtn(torch.randn(n, k), parse_scheme(scheme))
    x = torch.randn(m, k).to(dtype) * torch.logspace(-3, 3, m)[:, None].to(dtype)
    x[-1, :] = 0
    static = torch.tensor([0.01]) if activation == "fp8_static" else None
    bias = torch.randn(n).to(dtype)
    settings = (bias, scheme, activation, static)
    found = operators.quantized_linear(x, *codes, *settings)
    expected = torch.ops.llmc.quantized_linear(x, *codes, *settings)
    # Tensor cores keep 14 bits of a sum of products of e4m3.
    coarse = activation.startswith("fp8") and os.environ.get("LLMC_TEST_DEVICE") == "cuda"
    close(found, expected, 2e-2 if dtype == BF16 else 5e-3 if coarse else 1e-4)


def test_a_row_that_is_not_finite_stays_so(operators):
    codes = quantize_rtn(torch.randn(16, 64), parse_scheme("int8_channel"))
    x = torch.randn(2, 64)
    x[1, 3] = float("inf")
    found = operators.quantized_linear(x, *codes, None, "int8_channel", "int8_token")
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize(("width", "words"), [(128, 32), (16, 16), (100, 32)])
def test_words_hold_every_code(width, words):
    codes = torch.randint(0, 256, (5, width), dtype=torch.uint8)
    packed = pack_words(codes)
    assert packed.shape == (5, words)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_words(packed, width), codes)


def test_a_row_of_a_product_has_the_same_bits_in_every_batch(operators):
    x, weight = torch.randn(130, 96).to(BF16), torch.randn(70, 96).to(BF16)
    whole = operators.linear(x, weight, None)
    for m in (1, 17, 40):
        assert torch.equal(operators.linear(x[:m], weight, None), whole[:m])


@pytest.mark.parametrize("style", ["cast_then_scale", "scale_then_cast"])
@pytest.mark.parametrize(("dtype", "weighted"), [(BF16, True), (F32, True), (BF16, False)])
def test_norms(operators, style, dtype, weighted):
    x, residual = torch.randn(3, 200).to(dtype), torch.randn(3, 200).to(dtype)
    weight = torch.randn(200).to(dtype) if weighted else None
    bias = torch.randn(200).to(dtype) if weighted else None
    close(
        operators.rms_norm(x, weight, 1e-5, 1.0, style), torch.ops.llmc.rms_norm(x, weight, 1e-5, 1.0, style)
    )
    args = (weight, bias, 1e-5, 0.0, style)
    close(operators.layer_norm(x, *args), torch.ops.llmc.layer_norm(x, *args))
    found, total = operators.add_rms_norm(x, residual, weight, 1e-5, 0.0, style)
    expected, expected_total = torch.ops.llmc.add_rms_norm(x, residual, weight, 1e-5, 0.0, style)
    close(found, expected)
    assert torch.equal(total, expected_total)
    found, total = operators.add_layer_norm(x, residual, *args)
    close(found, torch.ops.llmc.add_layer_norm(x, residual, *args)[0])


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity"])
def test_gated_activations(operators, name):
    packed = torch.randn(3, 2 * 70).to(BF16)
    close(
        operators.gated_activation_packed(packed, name), torch.ops.llmc.gated_activation_packed(packed, name)
    )
    gate, up = torch.randn(3, 70) * 30, torch.randn(3, 70)
    close(operators.gated_activation(gate, up, name), torch.ops.llmc.gated_activation(gate, up, name))


def test_embedding(operators):
    table, ids = torch.randn(50, 70).to(BF16), torch.tensor([3, 49, 0, 3])
    assert torch.equal(operators.embedding(ids, table), table[ids])


@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize(("turning", "tail"), [(32, False), (16, False), (16, True)])
def test_rope_and_the_write_into_the_cache(operators, style, turning, tail):
    tokens, heads, groups, width, value_width, page = 5, 4, 2, 32, 24, 4
    fused = torch.randn(tokens, heads * width + groups * (width + value_width)).to(BF16)
    q, k, v = fused.split([heads * width, groups * width, groups * value_width], dim=1)
    q, k, v = q.view(tokens, heads, width), k.view(tokens, groups, width), v.view(tokens, groups, value_width)
    positions, slots = torch.tensor([0, 1, 2, 700, 9]), torch.tensor([3, 9, -1, 31, 0])
    inv_freq = 1e4 ** -(torch.arange(0, turning, 2) / turning)
    settings = (positions, inv_freq, 1.5, style, tail)
    caches = [torch.zeros(8, page, groups, w, dtype=BF16) for w in (width, value_width)]
    expected_caches = [cache.clone() for cache in caches]
    found, _ = operators.rope_kv_write(q, k, v, *settings, *caches, slots)
    expected, _ = torch.ops.llmc.rope_kv_write(q, k, v, *settings, *expected_caches, slots)
    close(found, expected)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        close(cache, expected_cache)
    close(operators.rope(q, *settings), torch.ops.llmc.rope(q, *settings))
    again = [torch.zeros_like(cache) for cache in caches]
    operators.kv_write(k, v, *again, slots)
    assert torch.equal(again[1], caches[1])
    assert torch.equal(again[0][0, 3], k[0])


@pytest.mark.parametrize("style", ["cast_then_scale", "scale_then_cast"])
@pytest.mark.parametrize("form", [BF16, torch.int8, torch.float8_e4m3fn])
def test_norms_of_queries_and_keys_are_part_of_rotation_and_write(operators, form, style):
    tokens, groups, width, page = 5, 2, 24, 4
    fused = torch.randn(tokens, 8 * width).to(BF16)
    q, k, v = (part.view(tokens, -1, width) for part in fused.split([4 * width, 2 * width, 2 * width], dim=1))
    q_weight, k_weight = (torch.randn(width).to(BF16) for _ in range(2))
    how = (1e-6, 1.0, style)
    positions, slots = torch.tensor([0, 1, 2, 700, 9]), torch.tensor([3, 9, -1, 31, 0])
    angles = (positions, 1e4 ** -(torch.arange(0, 16, 2) / 16), 1.0, "half", False)

    def caches():
        codes = [torch.zeros(8, page, groups, width).to(form) for _ in range(2)]
        return codes if form == BF16 else [*codes, *(torch.zeros(8, page, groups) for _ in range(2))]

    def values(held):
        return [cache.float() * scales[..., None] for cache, scales in zip(held[:2], held[2:], strict=True)]

    ours, theirs = caches(), caches()
    norms = (q_weight, k_weight, *how)
    found, _ = operators.normed_rope_kv_write(q, k, v, norms, *angles, *ours[:2], slots, *ours[2:])
    normed = [torch.ops.llmc.rms_norm(x, w, *how) for x, w in ((q, q_weight), (k, k_weight))]
    expected, _ = torch.ops.llmc.rope_kv_write(*normed, v, *angles, *theirs[:2], slots, *theirs[2:])
    close(found, expected)
    if form == BF16:
        close(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        return
    # A step of a code more: of the largest, 1/127, or 1/14 of e4m3.
    for mine, other in zip(values(ours), values(theirs), strict=True):
        close(mine, other, 0.03 if form == torch.int8 else 0.1)


def test_norms_of_another_dtype_stay_apart(operators):
    q, k = torch.randn(3, 2, 16).to(BF16), torch.randn(3, 1, 16).to(BF16)
    weights, how = (torch.randn(16), torch.randn(16)), (1e-6, 0.0, "cast_then_scale")
    positions = torch.arange(3)
    angles = (positions, torch.rand(8), 1.0, "half", False)
    ours, theirs = ([torch.zeros(2, 4, 1, 16) for _ in range(2)] for _ in range(2))
    v = k.float()
    found, _ = operators.normed_rope_kv_write(q, k, v, (*weights, *how), *angles, *ours, positions)
    normed = [torch.ops.llmc.rms_norm(x, w, *how) for x, w in zip((q, k), weights, strict=True)]
    expected, _ = torch.ops.llmc.rope_kv_write(*normed, v, *angles, *theirs, positions)
    close(found, expected)
    close(ours[0], theirs[0])


@pytest.mark.parametrize("form", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_codes_is_written_as_the_reference_writes_it(operators, form):
    tokens, groups, width, page = 6, 2, 24, 4
    k, v = (torch.randn(tokens, groups, width).to(BF16) * 3 for _ in range(2))
    k[3], v[4, 0, 5] = 0, float("nan")
    positions, slots = torch.arange(tokens), torch.tensor([3, 9, -1, 31, 0, 12])
    inv_freq = 1e4 ** -(torch.arange(0, width, 2) / width)
    q = torch.randn(tokens, 4, width).to(BF16)

    def caches():
        codes = [torch.zeros(8, page, groups, width).to(form) for _ in range(2)]
        return codes, [torch.full((8, page, groups), 7.0) for _ in range(2)]

    (ours, scales), (theirs, their_scales) = caches(), caches()
    settings = (positions, inv_freq, 1.0, "half", False)
    operators.rope_kv_write(q, k, v, *settings, *ours, slots, *scales)
    torch.ops.llmc.rope_kv_write(q, k, v, *settings, *theirs, slots, *their_scales)
    for found, expected in zip(scales, their_scales, strict=True):
        assert torch.allclose(found, expected, rtol=1e-2, equal_nan=True)
    again, again_scales = caches()
    operators.kv_write(k, v, *again, slots, *again_scales)
    plain, plain_scales = caches()
    torch.ops.llmc.kv_write(k, v, *plain, slots, *plain_scales)
    for found, expected in zip([*again, *again_scales], [*plain, *plain_scales], strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("form", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("news", [[5, 37, 1, 2], [1, 1, 1, 1]])
def test_attention_over_a_cache_of_codes(operators, form, news):
    q, k, v, *rest = paged_case([5, 90, 33, 20], news, 6, 2, 32, BF16)
    scales = [torch.rand(k.shape[:3]) * 0.02 + 0.001 for _ in range(2)]
    codes = [(t.float() * 40).round().clamp(-127, 127).to(form) for t in (k, v)]
    settings = (None, 32**-0.5, 0, 0.0, 0, *scales)
    expected = torch.ops.llmc.paged_attention(q, *codes, *rest, *settings)
    table = rest[1]
    for row, length in enumerate([5, 90, 33, 20]):  # what nobody sees may be anything
        for each in scales:
            each[table[row, (length - 1) // 16], (length - 1) % 16 + 1 :] = float("nan")
    close(operators.paged_attention(q, *codes, *rest, *settings), expected, 3e-2)


def paged_case(lengths, news, heads, groups, width, dtype):
    page = 16
    counts = [-(-length // page) for length in lengths]
    pages = torch.randperm(sum(counts)).tolist()
    table = torch.full((len(lengths), max(counts) + 1), -1)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([pages.pop() for _ in range(count)])
    caches = [torch.randn(sum(counts), page, groups, width).to(dtype) for _ in range(2)]
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0).tolist()])
    positions = torch.cat([torch.arange(n - new, n) for n, new in zip(lengths, news, strict=True)])
    q = torch.randn(sum(news), heads, width).to(dtype)
    return q, *caches, torch.empty(0), table, starts, positions


@pytest.mark.parametrize(
    ("window", "softcap", "chunk", "sinks"),
    [(0, 0.0, 0, False), (20, 0.0, 0, True), (0, 5.0, 0, False), (0, 0.0, 32, True)],
)
def test_attention_of_a_mixture_of_sequences(operators, window, softcap, chunk, sinks):
    case = paged_case([5, 90, 33, 20], [5, 37, 1, 2], 6, 2, 32, BF16)
    logits = torch.randn(6) if sinks else None
    settings = (logits, 32**-0.5, window, softcap, chunk)
    close(operators.paged_attention(*case, *settings), torch.ops.llmc.paged_attention(*case, *settings))


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (70, True)])
def test_decode_attention_splits_long_contexts(operators, window, sinks, monkeypatch):
    monkeypatch.setattr("llmc.kernels.cuda.operators.SPLIT", 128)
    case = paged_case([1, 300, 128, 129], [1, 1, 1, 1], 6, 2, 24, F32)
    settings = (torch.randn(6) if sinks else None, 24**-0.5, window, 0.0, 0)
    close(operators.paged_attention(*case, *settings), torch.ops.llmc.paged_attention(*case, *settings))


def test_attention_has_the_same_bits_in_prefill_and_in_decode(operators, monkeypatch):
    monkeypatch.setattr("llmc.kernels.cuda.operators.SPLIT", 128)
    q, k, v, written, table, starts, positions = paged_case([200], [60], 4, 2, 32, BF16)
    settings = (None, 32**-0.5, 100, 0.0, 0)
    whole = operators.paged_attention(q, k, v, written, table, starts, positions, *settings)
    one = torch.tensor([0, 1])
    for row in (0, 31, 59):
        alone = (q[row : row + 1], k, v, written, table, one, positions[row : row + 1])
        assert torch.equal(operators.paged_attention(*alone, *settings)[0], whole[row])
    tail = (q[20:], k, v, written, table, torch.tensor([0, 40]), positions[20:])
    assert torch.equal(operators.paged_attention(*tail, *settings), whole[20:])
