"""Row kernels: elementary functions, norms, activations, rope, look-ups and mixtures of experts, against
float64 and bit for bit between levels."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from llmc.kernels.packing import Codes, pack, pack_float
from llmc.spec.quant import parse_scheme

pytestmark = [pytest.mark.pure, pytest.mark.cpu]

FUNCTIONS = ["exp2", "exp", "tanh", "erf", "sigmoid"]


@pytest.fixture(scope="module")
def libraries(build):
    return build("rows_harness.cpp")


def p(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def n(value):
    return ctypes.c_int64(value)


def f(value):
    return ctypes.c_float(value)


def agreed(results):
    """The one result of all levels."""
    first, *rest = results
    for one in rest:
        np.testing.assert_array_equal(one, first)
    return first


def everywhere(libraries, name, x):
    results = []
    for library in libraries.values():
        out = np.empty_like(x)
        library.run_function(FUNCTIONS.index(name), p(x), p(out), n(len(x)))
        results.append(out)
    return agreed(results)


erf64 = np.vectorize(math.erf)
EXACT = {
    "exp2": (np.exp2, 2e-7, 0),
    "exp": (np.exp, 3e-7, 0),
    "tanh": (np.tanh, 3e-7, 0),
    "erf": (erf64, 4e-7, 2e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4e-7, 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate_and_the_same_everywhere(libraries, rng, name):
    function, relative, absolute = EXACT[name]
    x = np.concatenate(
        [
            rng.uniform(-80, 80, 40000),
            rng.uniform(-2, 2, 40000),
            rng.standard_normal(16000) * np.exp(rng.uniform(-40, 0, 16000)),
        ]
    ).astype(np.float32)
    x = x[: len(x) // 16 * 16]
    y, expected = everywhere(libraries, name, x), function(x.astype(np.float64))
    assert (np.abs(y - expected) <= relative * np.abs(expected) + absolute + 1e-37).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_nan_and_saturate(libraries, name):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-40] * 2, dtype=np.float32)
    x.view(np.uint32)[8] = 0x7F812345  # a NaN with low bits set
    y = everywhere(libraries, name, x)
    assert np.isnan(y[[0, 8]]).all()
    assert np.isfinite(y[1:8]).all()
    zero = {"exp2": 1, "exp": 1, "tanh": 0, "erf": 0, "sigmoid": 0.5}[name]
    assert y[3] == y[4] == zero
    low = {"exp2": 0, "exp": 0, "tanh": -1, "erf": -1, "sigmoid": 0}[name]
    assert y[2] == pytest.approx(low, abs=1e-37)


def test_fma_without_hardware_rounds_once(libraries, rng):
    count = 1 << 16
    a, b = (rng.standard_normal(count).astype(np.float32) for _ in range(2))
    c = (-a * b * (1 + rng.choice([0, 1e-7, -1e-7, 3e-4], count))).astype(np.float32)  # cancellation
    c[::3] = rng.standard_normal(len(c[::3])).astype(np.float32) * np.exp2(
        rng.integers(-60, 30, len(c[::3]))
    ).astype(np.float32)
    a[:16], b[:16], c[:16] = np.inf, [0, 1] * 8, [np.inf, -np.inf] * 8
    # Halfway cases: the product is one float, c a quarter and a bit of its last place.
    a[16:32], b[16:32] = np.float32(1 + 2**-23), 1
    c[16:32] = np.float32(2.0**-24) * np.array([1, 1 + 2**-23, -1, -1 - 2**-23] * 4, dtype=np.float32)
    results = []
    for library in libraries.values():
        out = np.empty_like(a)
        library.run_fma(p(a), p(b), p(c), p(out), n(count))
        results.append(out)
    agreed(results)


def test_conversions_of_every_half_and_bfloat16_ties(libraries, rng):
    half = np.arange(1 << 16, dtype=np.uint16)
    x = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    x[::2] = (x[::2] & 0xFFFF0000) | 0x8000  # exactly between two
    x = x.view(np.float32)
    for library in libraries.values():
        brain, single = np.empty(1 << 16, np.uint16), np.empty(1 << 16, np.float32)
        library.run_convert(p(x), p(brain), p(half), p(single), n(1 << 16))
        np.testing.assert_array_equal(single, half.view(np.float16).astype(np.float32))
        raw = x.view(np.uint32).astype(np.uint64)
        rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)
        nan = np.isnan(x)
        np.testing.assert_array_equal(brain[~nan], rounded[~nan])
        assert np.isnan((brain[nan].astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("width", [1, 15, 64, 100, 896, 2051])
def test_norms_match_float64(libraries, rng, layer, width):
    x = (rng.standard_normal((5, width)) + 3).astype(np.float32)
    residual = rng.standard_normal((5, width)).astype(np.float32)
    weight, bias = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    for use_residual, use_weight in ((False, True), (True, True), (False, False)):
        outs, totals = [], []
        for library in libraries.values():
            for threads in (1, 3):
                out, total = np.empty_like(x), np.empty_like(x)
                library.run_norm(
                    threads,
                    int(layer),
                    p(x),
                    p(residual) if use_residual else None,
                    p(total),
                    p(out),
                    n(5),
                    n(width),
                    p(weight) if use_weight else None,
                    p(bias) if layer and use_weight else None,
                    f(1e-5),
                    f(1.0),
                )
                outs.append(out)
                totals.append(total)
        summed = x + residual if use_residual else x
        if use_residual:
            np.testing.assert_array_equal(agreed(totals), summed)
        value = summed.astype(np.float64)
        if layer:
            value = value - value.mean(axis=1, keepdims=True)
        expected = value / np.sqrt((value**2).mean(axis=1, keepdims=True) + 1e-5)
        if use_weight:
            expected = expected * (weight.astype(np.float64) + 1.0) + (bias if layer else 0)
        np.testing.assert_allclose(agreed(outs), expected, rtol=2e-5, atol=2e-5)


def gelu(x):
    return 0.5 * x * (1 + erf64(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = [
    ("silu", lambda x: x / (1 + np.exp(-x))),
    ("gelu", gelu),
    ("gelu_tanh", gelu_tanh),
    ("relu", lambda x: np.maximum(x, 0)),
    ("relu2", lambda x: np.maximum(x, 0) ** 2),
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ("identity", lambda x: x),
]


@pytest.mark.parametrize("which", range(len(ACTIVATIONS)), ids=[name for name, _ in ACTIVATIONS])
def test_activations_in_every_form(libraries, rng, which):
    for width in (1, 31, 33, 96, 200):
        gate, up = (4 * rng.standard_normal((3, width)).astype(np.float32) for _ in range(2))
        padded = -(-width // 32) * 32
        both = np.zeros((3, padded // 32, 2, 32), dtype=np.float32)
        for index, half in enumerate((gate, up)):
            wide = np.zeros((3, padded), dtype=np.float32)
            wide[:, :width] = half
            both[:, :, index] = wide.reshape(3, -1, 32)
        expected = ACTIVATIONS[which][1](gate.astype(np.float64))
        gated, alone = [], []
        for library in libraries.values():
            for form, source in ((0, gate), (1, both), (2, gate)):
                out = np.full_like(gate, np.nan)
                library.run_activation(2, which, form, p(source), p(up), p(out), n(3), n(width))
                (alone if form == 2 else gated).append(out)
        np.testing.assert_allclose(agreed(gated), expected * up, rtol=2e-6, atol=5e-6)
        np.testing.assert_allclose(agreed(alone), expected, rtol=2e-6, atol=2e-6)


def test_clamped_swiglu_and_softcap(libraries, rng):
    gate, up = (10 * rng.standard_normal(100).astype(np.float32) for _ in range(2))
    products, capped = [], []
    for library in libraries.values():
        out, x = np.empty_like(gate), gate.reshape(4, 25).copy()
        library.run_clamped(p(gate), p(up), p(out), n(100), f(1.702), f(7.0))
        library.run_softcap(p(x), n(4), n(25), f(5.0))
        products.append(out)
        capped.append(x)
    g, u = np.minimum(gate.astype(np.float64), 7), np.clip(up.astype(np.float64), -7, 7)
    np.testing.assert_allclose(agreed(products), (u + 1) * g / (1 + np.exp(-1.702 * g)), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(agreed(capped).ravel(), 5 * np.tanh(gate.astype(np.float64) / 5), rtol=1e-6)


@pytest.mark.parametrize("style", [0, 1, 2], ids=["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize("tail", [False, True])
def test_rope_rotates_like_complex_numbers(libraries, rng, style, tail):
    for heads, width, pairs in ((3, 64, 32), (2, 40, 10), (1, 6, 3)):
        positions = np.array([0, 1, 77, 4095, 131071, 999_999], dtype=np.int64)
        inv_freq = (10000.0 ** -(np.arange(pairs) / pairs)).astype(np.float32)
        x = rng.standard_normal((6, heads, width)).astype(np.float32)
        results = []
        for library in libraries.values():
            out, table = x.copy(), np.empty((6, 2, pairs), dtype=np.float32)
            library.run_rope(
                2,
                style,
                p(out),
                p(positions),
                p(inv_freq),
                p(table),
                f(1.5),
                n(6),
                n(heads),
                n(width),
                n(pairs),
                int(tail),
            )
            results.append(out)
        angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
        part = slice(width - 2 * pairs, width) if tail else slice(0, 2 * pairs)
        rotated = x[..., part].astype(np.float64)
        split = np.split(rotated, 2, axis=2) if style == 0 else (rotated[..., 0::2], rotated[..., 1::2])
        turned = (split[0] + 1j * split[1]) * np.exp(1j * angle) * 1.5
        expected = x.astype(np.float64)
        if style == 1:
            expected[..., part] = np.stack((turned.real, turned.imag), axis=-1).reshape(rotated.shape)
        else:
            expected[..., part] = np.concatenate((turned.real, turned.imag), axis=2)
        np.testing.assert_allclose(agreed(results), expected, atol=2e-6)


def test_embeddings_read_every_packing(libraries, rng):
    ids = np.array([0, 39, 7, 32, 31], dtype=np.int64)
    table = rng.standard_normal((40, 96)).astype(np.float32)
    asym, channel = parse_scheme("int4_g32_asym"), parse_scheme("int8_channel")
    nibbles = rng.integers(0, 16, (40, 96))
    scales, zeros = (
        rng.standard_normal((40, 3)).astype(np.float16),
        rng.integers(0, 16, (40, 3), dtype=np.uint8),
    )
    codes4 = Codes((nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).astype(np.uint8), scales, zeros)
    bytes8 = rng.integers(-128, 128, (40, 96)).astype(np.int8)
    codes8 = Codes(bytes8, scales[:, :1], None)
    brain = (table.view(np.uint32) >> 16).astype(np.uint16)
    half = table.astype(np.float16)
    group = np.arange(96) // 32
    cases = [
        (
            pack(codes4, asym, 96),
            (nibbles - zeros[:, group].astype(int)) * scales[:, group].astype(np.float32),
        ),
        (pack(codes8, channel, 96), bytes8 * scales[:, :1].astype(np.float32)),
        (pack_float(table), table),
        (pack_float(brain), (brain.astype(np.uint32) << 16).view(np.float32)),
        (half, half.astype(np.float32)),
    ]
    for kind, (packed, values) in enumerate(cases):
        for library in libraries.values():
            out = np.empty((5, 96), dtype=np.float32)
            library.run_embedding(kind, p(ids), n(5), p(packed), n(96), p(out))
            np.testing.assert_array_equal(out, values[ids].astype(np.float32))


def random_expert_weights(rng, experts, num_rows, width):
    """Packed int4_g32 matrices one after the other, and their values [E, N, K]."""
    scheme = parse_scheme("int4_g32")
    codes = rng.integers(-8, 8, (experts, num_rows, width))
    scales = (0.05 * rng.standard_normal((experts, num_rows, -(-width // 32)))).astype(np.float16)
    values = codes * np.repeat(scales.astype(np.float64), 32, axis=2)[..., :width]
    stored = np.zeros((experts, num_rows, scheme.padded_in_features(width)), dtype=np.int64)
    stored[..., :width] = codes
    stored += 8
    nibbles = (stored[..., 0::2] | (stored[..., 1::2] << 4)).astype(np.uint8)
    packed = [pack(Codes(nibbles[e], scales[e], None), scheme, width) for e in range(experts)]
    return np.concatenate([*packed, np.zeros(8192, np.uint8)]), values


def test_mixtures_of_experts_match_float64_and_do_not_mix_tokens(libraries, rng):
    experts, width, hidden, choices = 7, 96, 64, 3
    gate_up, gate_up_values = random_expert_weights(rng, experts, 2 * hidden, width)
    down, down_values = random_expert_weights(rng, experts, width, hidden)
    gate_up_bias = rng.standard_normal((experts, 2 * hidden)).astype(np.float32)
    down_bias = rng.standard_normal((experts, width)).astype(np.float32)
    x = rng.standard_normal((19, width)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:choices] for _ in range(19)]).astype(np.int64)
    weights = rng.random((19, choices)).astype(np.float32)

    def run(library, rows, threads):
        some, chosen, how_much = (np.ascontiguousarray(a[rows]) for a in (x, ids, weights))
        out = np.full_like(some, np.nan)
        scratch = np.zeros(1 << 20, dtype=np.uint8)
        at = ctypes.c_void_p(scratch.ctypes.data + -scratch.ctypes.data % 64)
        library.run_moe(
            threads,
            p(some),
            p(chosen),
            p(how_much),
            p(gate_up),
            p(down),
            p(gate_up_bias),
            p(down_bias),
            p(out),
            n(len(some)),
            n(choices),
            n(experts),
            n(width),
            n(hidden),
            at,
        )
        return out

    whole = agreed([run(library, slice(0, 19), t) for library in libraries.values() for t in (1, 3)])
    for library in libraries.values():
        for rows in (slice(4, 5), slice(2, 12)):
            np.testing.assert_array_equal(run(library, rows, 2), whole[rows])
    expected = np.zeros((19, width))
    for t in range(19):
        for c in range(choices):
            e = ids[t, c]
            both = gate_up_values[e] @ x[t] + gate_up_bias[e]
            tiles = both.reshape(-1, 2, 32)
            gate, up = tiles[:, 0].ravel(), tiles[:, 1].ravel()
            expected[t] += weights[t, c] * (down_values[e] @ (gate / (1 + np.exp(-gate)) * up) + down_bias[e])
    np.testing.assert_allclose(whole, expected, atol=2e-3 * np.abs(expected).max())
