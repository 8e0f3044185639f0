"""Products with the norm before and the gate or residual addition behind them: against float64, and to the
bit the same for a row alone, among few and among many, whichever way K is summed."""

from __future__ import annotations

import pytest
import torch

from llmc.ir import ops
from llmc.ir.quantized import dequantize_rows, quantize_rtn
from llmc.kernels.cuda.packing import pack_words
from llmc.kernels.cuda.products import BYTES, DENSE, WORDS, turns_of_part
from llmc.kernels.cuda.variants import layer_columns, num_parts
from llmc.spec.quant import parse_scheme

assert ops
BF16 = torch.bfloat16
SCHEMES = ["", "int4_g32", "int4_g128", "int4_g32_asym", "int8_g32", "fp8_channel", "int8_channel+int8_token"]
EPS = 1e-5


def weight_of(scheme, n, k):
    """The operator's arguments behind x, and the values that they stand for."""
    plain = torch.randn(n, k) / k**0.5
    if not scheme:
        stored = plain.to(BF16)
        return (stored, None), stored.double()
    name, _, activation = scheme.partition("+")
    parsed = parse_scheme(name)
    codes = quantize_rtn(plain, parsed)
    stored = codes.codes if parsed.bits == 8 else pack_words(codes.codes)
    values = dequantize_rows(*codes, parsed, k, torch.float32).double()
    return (stored, codes.scales, codes.zeros, None, name, activation, None), values


def exact(x, values, norm, gate, residual, rounds_x):
    """The same in float64, rounded nowhere, and the most that roundings to bfloat16 (half a step is 2^-8 of a
    value) and of x to 127 steps can change of it."""
    step = 2.0**-8
    wide = x.double()
    if norm is not None:
        weight, eps, offset, _ = norm
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (weight.double() + offset)
    each = wide.abs() * step
    if rounds_x:
        each = each + wide.abs().amax(1, keepdim=True) / 253
    y = wide @ values.T
    # Weights of codes are values in float32 here and codes times scales there.
    slack = 1.01 * (each @ values.abs().T + step * y.abs() + 1e-5 * (wide.abs() @ values.abs().T))
    if gate:
        half = y.shape[1] // 2
        active, up = torch.nn.functional.silu(y[:, :half]), y[:, half:]
        of_active, of_up = 1.1 * slack[:, :half] + step * active.abs(), slack[:, half:]
        y = active * up
        slack = of_active * (up.abs() + of_up) + active.abs() * of_up + 1.01 * step * y.abs()
    if residual is not None:
        y = y + residual.double()
        slack = slack + 1.01 * step * (y.abs() + slack)
    return y, slack


def rows_of(m, k):
    return (torch.randn(m, k) * torch.logspace(-2, 2, m)[:, None]).to(BF16)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["norm+gate", "residual"])
def test_what_is_around_a_product(operators, scheme, form):
    k, n = 160, 76
    weight, values = weight_of(scheme, n, k)
    x = rows_of(70, k)
    norm = ((torch.rand(k) + 0.5).to(BF16), EPS, 0.25, "scale_then_cast") if "norm" in form else None
    gate = "silu" if "gate" in form else ""
    residual = torch.randn(70, n).to(BF16) if form == "residual" else None
    whole = operators.product(x, weight, norm, gate, residual)
    expected, slack = exact(x, values, norm, gate, residual, "+" in scheme)
    assert whole.dtype == BF16
    assert ((whole.double() - expected).abs() <= slack).all()
    for first, last in ((0, 1), (3, 8), (20, 41)):
        held = None if residual is None else residual[first:last]
        part = operators.product(x[first:last], weight, norm, gate, held)
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize(
    "scheme", ["", "int4_g32_asym", "int8_g32", "fp8_channel", "int8_channel+int8_token"]
)
def test_parts_of_k_are_summed_in_one_order(operators, scheme):
    k, n = 2304, 20
    assert num_parts(DENSE, n, k) == num_parts(WORDS, n, k) == 2
    weight, values = weight_of(scheme, n, k)
    x, residual = rows_of(70, k), torch.randn(70, n).to(BF16)
    norm = ((torch.rand(k) + 0.5).to(BF16), EPS, 0.0, "cast_then_scale")
    whole = operators.product(x, weight, norm, "", residual)
    expected, slack = exact(x, values, norm, "", residual, "+" in scheme)
    assert ((whole.double() - expected).abs() <= slack).all()
    for first, last in ((0, 1), (5, 16), (0, 33)):
        part = operators.product(x[first:last], weight, norm, "", residual[first:last])
        assert torch.equal(part, whole[first:last])


def test_parts_do_not_depend_on_rows_and_keep_a_gpu_busy():
    for kernel in (DENSE, BYTES, WORDS):
        for n, k in ((6144, 4096), (4096, 4096), (4096, 14336), (3072, 2048), (2048, 8192)):
            parts = num_parts(kernel, n, k)
            assert parts > 1
            # A program's weights are at least as many either way.
            columns = layer_columns(kernel, n, k)
            assert k // parts * columns >= 1024 * 64
            assert parts * -(-n // columns) >= 96
        assert num_parts(kernel, 28672, 4096) == num_parts(kernel, 128256, 4096) == 1
        assert num_parts(kernel, 64, 512) == 1
    # Matrices of 8B and 1B read words with many columns a program, which takes fewer instructions; where K
    # has no two parts for twice the columns, and where rows of a program would be nobody's, it has few.
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (2048, 2048), (3072, 2048), (2048, 8192)]
    assert {layer_columns(WORDS, n, k) for n, k in shapes} == {128}
    assert num_parts(WORDS, 2048, 2048) == 2 * num_parts(DENSE, 2048, 2048) == 4
    assert {layer_columns(WORDS, n, k) for n, k in ((1152, 896), (64, 4096), (192, 4096))} == {64}
    # Where K has no parts, one program of 128 columns takes fewer instructions than two of 64 after another.
    assert (num_parts(WORDS, 9728, 896), layer_columns(WORDS, 9728, 896)) == (1, 128)


@pytest.mark.parametrize("num_blocks", range(1, 40))
def test_turns_of_a_part_leave_little_over(num_blocks):
    """All of a short part is one turn; of a long one less than an eighth is beyond the end."""
    unroll, turns = turns_of_part(num_blocks, 16, 4)
    beyond = unroll * turns - num_blocks
    assert 0 <= beyond <= num_blocks / 8
    assert unroll < 8
    assert (turns == 1) == (num_blocks < 8)
    assert turns_of_part(num_blocks, 32, 1) == turns_of_part(num_blocks, 16, 4)
    # Sums of a turn are at once in tensor memory.
    unroll, turns = turns_of_part(num_blocks, 32, 4)
    assert unroll <= 3
    assert 0 <= unroll * turns - num_blocks < unroll
    assert turns_of_part(num_blocks, 64, 4) == (1, num_blocks)


def test_arrivals_are_left_as_they_were_found(launch):
    from llmc.kernels.cuda.operators import CudaOperators

    arrived = torch.zeros(64, dtype=torch.int32)
    operators = CudaOperators(launch, arrived=arrived)
    weight, _ = weight_of("", 20, 2304)
    x = rows_of(1, 2304)
    first = operators.product(x, weight, None, "", None)
    assert not arrived.any()
    assert torch.equal(operators.product(x, weight, None, "", None), first)


@pytest.mark.parametrize("form", ["norm+gate", "residual"])
def test_a_library_multiplies_many_rows_where_they_need_not_be_invariant(launch, form):
    """What it launches around the product rounds where operators do: once more than ours."""
    from llmc.kernels.cuda.operators import CudaOperators

    if not hasattr(launch, "__name__"):
        pytest.skip("this test's tensors are on the CPU")
    launched = []

    def noted(wanted):
        launched.append(wanted.specialisation.kernel)
        launch(wanted)

    free, ours = CudaOperators(noted, invariant=False), CudaOperators(launch)
    weight, values = weight_of("", 76, 160)
    x, residual = rows_of(70, 160), torch.randn(70, 76).to(BF16) if form == "residual" else None
    norm = ((torch.rand(160) + 0.5).to(BF16), EPS, 0.0, "cast_then_scale") if "norm" in form else None
    gate = "silu" if "gate" in form else ""
    found = free.product(x, weight, norm, gate, residual)
    assert launched == (["normalize.normalize", "activation.gated_activation"] if norm else [])
    expected, slack = exact(x, values, norm, gate, residual, rounds_x=False)
    assert found.dtype == BF16
    assert ((found.double() - expected).abs() <= 3 * slack).all()
    few = None if residual is None else residual[:64]
    assert torch.equal(
        free.product(x[:64], weight, norm, gate, few), ours.product(x[:64], weight, norm, gate, few)
    )
    # Codes have no library, and it takes no two dtypes.
    coded, _ = weight_of("int4_g32", 76, 160)
    assert not free.library_multiplies(x, coded, None)
    assert not free.library_multiplies(x.float(), weight, None)
