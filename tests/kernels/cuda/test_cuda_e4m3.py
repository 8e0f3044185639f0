"""Products of e4m3 by e4m3 as the architectures that have them compute them: against float64 over the same
codes, and a row's bits the same in every batch."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from llmc.ir import ops
from llmc.ir.quantized import quantize_rtn
from llmc.ir.rounded import code_groups
from llmc.kernels.cuda.operators import CudaOperators
from llmc.spec.quant import parse_activation, parse_scheme

assert ops
F32 = torch.float32
SCHEME, ACTIVATION = "fp8_channel", "fp8_token"


# On a GPU every product is compiled for its architecture.
ON_DEVICE = os.environ.get("LLMC_TEST_DEVICE") == "cuda"


@pytest.fixture
def hardware(launch, operators):
    """Operators whose products of codes are those of an architecture with e4m3."""
    if ON_DEVICE:
        return operators

    def with_e4m3(wanted):
        specialisation = wanted.specialisation
        if specialisation.kernel == "linear_bytes.linear_bytes":
            constants = (*specialisation.constants, ("E4M3", True))
            wanted = replace(wanted, specialisation=replace(specialisation, constants=constants))
        launch(wanted)

    return CudaOperators(with_e4m3)


def codes_of(n, k):
    return quantize_rtn(torch.randn(n, k) * torch.logspace(-1, 1, n)[:, None], parse_scheme(SCHEME))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 256), (19, 33, 160), (5, 20, 2304)])
def test_products_of_codes_are_exact_but_for_float32_sums(hardware, operators, m, n, k):
    weight, x = codes_of(n, k), torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    found = hardware.quantized_linear(x, *weight, None, SCHEME, ACTIVATION)
    coded = code_groups(x, parse_activation(ACTIVATION))
    rows = coded.codes.double() * coded.scales.double()
    matrix = weight.codes[:, :k].double() * weight.scales.double()
    # Products of codes are exact; each addition and each scale rounds by 2^-24. Tensor cores keep 14 bits of
    # a step's sum.
    step = 2.0**-12 if ON_DEVICE else 2.0**-24
    slack = (k + 4) * step * (rows.abs() @ matrix.abs().T)
    assert ((found.double() - rows @ matrix.T).abs() <= slack).all()
    # What architectures without e4m3 compute differs by the order of sums alone.
    soft = operators.quantized_linear(x, *weight, None, SCHEME, ACTIVATION)
    assert ((found.double() - soft.double()).abs() <= 2 * slack).all()


def test_a_row_has_the_same_bits_in_every_batch(hardware):
    weight, x = codes_of(70, 2304), torch.randn(130, 2304).bfloat16()
    residual = torch.randn(130, 70).bfloat16()
    norm = (torch.rand(2304).bfloat16() + 0.5, 1e-5, 0.0, "cast_then_scale")
    given = (*weight, None, SCHEME, ACTIVATION, None)
    whole = hardware.product(x, given, norm, "", residual)
    for first, last in ((0, 1), (3, 20), (40, 81)):
        part = hardware.product(x[first:last], given, norm, "", residual[first:last])
        assert torch.equal(part, whole[first:last])
