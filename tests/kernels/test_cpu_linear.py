"""Matrix products of the CPU kernels: against float64, and bit for bit across rows, threads and levels."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass

import numpy as np
import pytest

from llmc.kernels.catalog import allocated_bytes, integer_linear
from llmc.kernels.levels import AMX
from llmc.kernels.packing import Codes, pack, pack_float
from llmc.spec.quant import parse_scheme

pytestmark = [pytest.mark.pure, pytest.mark.cpu]

# (scheme, limbs, activation group)
CASES = [
    ("int4_g32", 1, 32),
    ("int4_g32", 2, 32),
    ("int4_g32", 1, 128),
    ("int4_g128", 1, 32),
    ("int4_g128", 2, 128),
    ("int4_g64_asym", 2, 64),
    ("int3_g32_asym", 1, 64),
    ("int8_g32", 1, 32),
    ("int8_channel", 2, 128),
    ("int8_g128_asym", 2, 32),
]
KERNELS = [integer_linear(parse_scheme(s), limbs=n, activation_group=g) for s, n, g in CASES]
ENTRIES = ",".join(
    f"SCHEME({k.layout.bits},{k.layout.group},{k.unit},{k.limbs},{str(k.layout.zeros).lower()},{k.activation_group})"
    for k in KERNELS
)


class Call(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("ldx", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("x_rows", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("ldy", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def libraries(build, product_levels):
    loaded = build("linear_harness.cpp", (f"LLMC_TEST_SCHEMES={ENTRIES}",), product_levels)
    for library in loaded.values():
        library.scratch_bytes.restype = ctypes.c_int64
        library.scratch_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return loaded


def aligned(num_bytes):
    """Zeroed memory at a multiple of 64, with room behind it."""
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def placed(values):
    memory = aligned(allocated_bytes(values.nbytes))
    memory[: values.nbytes] = values.reshape(-1).view(np.uint8)
    return memory


@dataclass
class Weight:
    """A random matrix, as kernels read it and as float64."""

    entry: int
    packed: np.ndarray
    values: np.ndarray
    bias: np.ndarray

    @property
    def shape(self):
        return self.values.shape


def random_weight(rng, entry, num_rows, width):
    scheme = parse_scheme(CASES[entry][0])
    low = -(1 << (scheme.bits - 1)) if scheme.symmetric else 0
    stored = np.zeros((num_rows, scheme.padded_in_features(width)), dtype=np.int16)
    stored[:, :width] = rng.integers(low, low + (1 << scheme.bits), (num_rows, width))
    groups = scheme.num_groups(width)
    scales = (0.01 * rng.standard_normal((num_rows, groups))).astype(np.float16)
    zeros = None
    if not scheme.symmetric:
        zeros = rng.integers(0, 1 << scheme.bits, (num_rows, groups), dtype=np.uint8)
    if scheme.bits == 8:
        codes = stored.astype(np.int8 if scheme.symmetric else np.uint8)
    else:
        shifted = stored + (1 << (scheme.bits - 1)) if scheme.symmetric else stored
        codes = (shifted[:, 0::2] | (shifted[:, 1::2] << 4)).astype(np.uint8)
    group_of = np.arange(width) // (scheme.group_size or width)
    offset = 0 if zeros is None else zeros[:, group_of].astype(np.float64)
    values = (stored[:, :width] - offset) * scales[:, group_of].astype(np.float64)
    packed = placed(pack(Codes(codes, scales, zeros), scheme, width))
    return Weight(entry, packed, values, rng.standard_normal(num_rows).astype(np.float32))


def quantized_activations(x, entry):
    """What the kernels make of x, in float64 (rounding of `x * factor` to an integer as float32 does it)."""
    kernel, width = KERNELS[entry], x.shape[1]
    size = kernel.activation_group
    padded = np.zeros((x.shape[0], -(-width // size) * size), dtype=np.float32)
    padded[:, :width] = x
    groups = padded.reshape(x.shape[0], -1, size)
    top = np.float32(127 if kernel.limbs == 1 else 32512)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    factor = np.where(peak < 1e-30, np.float32(0), top / np.maximum(peak, np.float32(1e-30)))
    scale = np.where(peak < 1e-30, np.float32(0), peak / top)
    codes = np.rint(groups * factor)
    return (codes.astype(np.float64) * scale).reshape(x.shape[0], -1)[:, :width]


def product(library, weight, x, *, threads=1, add=None, index=None, bias=True):
    rows, (num_out, width) = (len(x) if index is None else len(index)), weight.shape
    stride = num_out + 3
    y = np.full((rows, stride), 7.0, dtype=np.float32)
    if add is not None:
        y[:, :num_out] = add
    if isinstance(weight.entry, int):
        scratch = aligned(max(64, library.scratch_bytes(weight.entry, len(x), width)))
    else:
        scratch = aligned(64)
    call = Call(
        weight=weight.packed.ctypes.data,
        x=x.ctypes.data,
        ldx=x.strides[0] // 4,
        index=None if index is None else index.ctypes.data,
        x_rows=len(x),
        rows=rows,
        bias=weight.bias.ctypes.data if bias else None,
        y=y.ctypes.data,
        ldy=stride,
        in_features=width,
        out_features=num_out,
        threads=threads,
        add=add is not None,
        scratch=scratch.ctypes.data,
    )
    if isinstance(weight.entry, int):
        library.run_integer(weight.entry, ctypes.byref(call))
    else:
        library.run_float({"float32": 32, "bfloat16": 16, "float16": 15}[weight.entry], ctypes.byref(call))
    assert (y[:, num_out:] == 7.0).all(), "wrote beyond the last column"
    return y[:, :num_out].copy()


SHAPES = [(1, 32), (33, 31), (64, 128), (70, 200), (129, 520), (96, 1096)]


@pytest.mark.parametrize("entry", range(len(CASES)), ids=lambda e: "-".join(map(str, CASES[e])))
def test_integer_products_match_float64(libraries, rng, entry):
    for num_rows, width in SHAPES:
        weight = random_weight(rng, entry, num_rows, width)
        x = rng.standard_normal((33, width)).astype(np.float32)
        expected = quantized_activations(x, entry) @ weight.values.T + weight.bias
        scale = np.abs(x).astype(np.float64) @ np.abs(weight.values.T) + np.abs(weight.bias)
        for name, library in libraries.items():
            y = product(library, weight, x)
            assert (np.abs(y - expected) <= 1e-6 * scale).all(), (name, num_rows, width)


@pytest.mark.parametrize("entry", range(len(CASES)), ids=lambda e: "-".join(map(str, CASES[e])))
def test_each_row_has_its_own_bits(libraries, rng, entry):
    """Any number of rows from 1 to 33 and more, any threads, any level: the same bits."""
    weight = random_weight(rng, entry, 70, 456)
    x = rng.standard_normal((200, 456)).astype(np.float32) * np.exp(rng.standard_normal((200, 1))).astype(
        np.float32
    )
    whole = product(libraries["generic"], weight, x)
    for name, library in libraries.items():
        for rows in [*range(1, 34), 66, 200]:
            start = int(rng.integers(0, 200 - rows + 1))
            threads = int(rng.integers(1, 5))
            y = product(library, weight, x[start : start + rows], threads=threads)
            np.testing.assert_array_equal(y, whole[start : start + rows], err_msg=f"{name} {rows} {threads}")


def test_rows_may_be_chosen_and_results_added(libraries, rng):
    weight = random_weight(rng, 0, 65, 96)
    x = rng.standard_normal((9, 96)).astype(np.float32)
    index = np.array([8, 0, 3, 3, 7, 1, 1, 2, 6, 5, 4, 0], dtype=np.int32)
    residual = rng.standard_normal((9, 65)).astype(np.float32)
    for name, library in libraries.items():
        whole = product(library, weight, x)
        np.testing.assert_array_equal(product(library, weight, x, index=index), whole[index], err_msg=name)
        added = product(library, weight, x, add=residual, threads=2)
        np.testing.assert_array_equal(added, whole + residual, err_msg=name)
        plain = product(library, weight, x, bias=False)
        np.testing.assert_array_equal(plain + weight.bias, whole, err_msg=name)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entry", [0, 4, 9])
def test_a_row_that_is_not_finite_says_so_and_spoils_no_other(libraries, rng, entry, poison):
    weight = random_weight(rng, entry, 64, 256)
    x = rng.standard_normal((12, 256)).astype(np.float32)
    clean = product(libraries["generic"], weight, x)
    x[5, 77] = poison
    for name, library in libraries.items():
        y = product(library, weight, x)
        assert not np.isfinite(y[5]).any(), name
        np.testing.assert_array_equal(np.delete(y, 5, axis=0), np.delete(clean, 5, axis=0), err_msg=name)


@pytest.mark.parametrize("entry", [0, 1, 7])
def test_groups_of_nothing_and_of_extremes(libraries, rng, entry):
    weight = random_weight(rng, entry, 32, 128)
    x = np.zeros((4, 128), dtype=np.float32)
    x[1] = 1e-38 * rng.standard_normal(128)
    x[2] = 1e30 * rng.standard_normal(128)
    x[3, ::2], x[3, 1::2] = 3.0, -3.0
    results = [product(library, weight, x, bias=False) for library in libraries.values()]
    assert not results[0][:2].any()
    expected = quantized_activations(x, entry) @ weight.values.T
    scale = np.abs(x).astype(np.float64) @ np.abs(weight.values.T)
    assert (np.abs(results[0] - expected) <= 1e-6 * scale + 1e-30).all()
    for one in results[1:]:
        np.testing.assert_array_equal(one, results[0])


def random_floats(rng, dtype, num_rows, width):
    values = (0.05 * rng.standard_normal((num_rows, width))).astype(np.float32)
    if dtype == "bfloat16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = values.astype(dtype)
    bias = rng.standard_normal(num_rows).astype(np.float32)
    return Weight(
        dtype, placed(pack_float(stored)), stored.astype(np.float64) if dtype != "bfloat16" else values, bias
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float_products_match_float64_and_keep_their_bits(libraries, rng, dtype):
    for num_rows, width in [(1, 1), (33, 31), (70, 257), (128, 640)]:
        weight = random_floats(rng, dtype, num_rows, width)
        x = rng.standard_normal((33, width)).astype(np.float32)
        expected = x.astype(np.float64) @ weight.values.astype(np.float64).T + weight.bias
        scale = np.abs(x) @ np.abs(weight.values).T + np.abs(weight.bias)
        whole = product(libraries["generic"], weight, x)
        assert (np.abs(whole - expected) <= 2e-6 * scale).all()
        for name, library in libraries.items():
            for rows in (1, 2, 3, 7, 8, 9, 33):
                y = product(library, weight, x[:rows], threads=int(rng.integers(1, 4)))
                np.testing.assert_array_equal(y, whole[:rows], err_msg=f"{name} {rows} {num_rows} {width}")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tiles are of x86-64")
def test_the_tile_level_compiles_to_tile_instructions(compile_level):
    """What no test here can run where there is no AMX is at least accepted, and holds the instructions."""
    library = compile_level("linear_harness.cpp", AMX, (f"LLMC_TEST_SCHEMES={ENTRIES}",)).read_bytes()
    assert bytes.fromhex("c4e24a5ec4") in library  # tdpbsud %tmm6, %tmm4, %tmm0
