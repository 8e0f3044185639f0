"""Finding codes: every method against plain rounding and against the numbers it minimises, by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.ir.quantized import dequantize_rows, quantize_rtn
from llmc.passes.quantize.descent import descend
from llmc.passes.quantize.grid import nearest_codes, rtn_grid, values_of
from llmc.passes.quantize.moments import Drift, SecondMoments
from llmc.passes.quantize.propagation import Propagation
from llmc.passes.quantize.rounding import Method, round_matrix
from llmc.passes.quantize.searched_grid import search_grid
from llmc.spec.quant import parse_scheme

SCHEMES = ("int4_g32", "int3_g128", "int4_g64_asym", "int4_channel", "int8_g32", "int3_channel_asym")
METHODS = (
    Method(search=True),
    Method(search=False, propagate=True),
    Method(propagate=True),
    Method(propagate=True, rounds=2),
)


def inputs(rows, width, seed=0):
    """Rows whose columns vary together and differ in size, a few of them much larger than the rest."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw) / width**0.5
    x = torch.randn(rows, width, generator=draw) @ (mix + torch.eye(width))
    x[:, :: max(1, width // 3)] *= 8
    return x


def weights(rows, width, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=draw) * torch.rand(rows, 1, generator=draw)


def gram_of(x):
    moments = SecondMoments(x.shape[1])
    moments.observe(x)
    return moments.gram()


def loss(error, gram):
    error, gram = error.double(), gram.double()
    return ((error @ gram) * error).sum()


def decoded(tensor, scheme, width):
    return dequantize_rows(*tensor, scheme, width)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("width", [32, 100, 256])
def test_no_method_is_worse_than_rounding_to_nearest(name, method, width):
    """Row by row; and the errors reported are those of the codes given back."""
    scheme, weight = parse_scheme(name), weights(24, width)
    gram = gram_of(inputs(600, width))
    rounded = round_matrix(weight, scheme, method, gram, Propagation(gram))
    plain = weight - decoded(quantize_rtn(weight, scheme), scheme, width)
    found = weight - decoded(rounded.tensor, scheme, width)
    for row in range(24):
        assert loss(found[row : row + 1], gram) <= loss(plain[row : row + 1], gram) * (1 + 1e-4)
    assert rounded.error == pytest.approx(float(loss(found, gram) / loss(weight, gram)), rel=1e-3)
    assert rounded.nearest_error == pytest.approx(float(loss(plain, gram) / loss(weight, gram)), rel=1e-3)


def test_each_step_of_the_method_helps():
    scheme, weight = parse_scheme("int4_g64"), weights(64, 256)
    gram = gram_of(inputs(2000, 256))
    errors = [round_matrix(weight, scheme, m, gram, Propagation(gram)).error for m in METHODS]
    nearest = round_matrix(weight, scheme, METHODS[0], gram).nearest_error
    searched, propagated, both, descended = errors
    assert descended < both < searched < 0.95 * nearest
    assert both < 0.6 * nearest
    assert propagated < searched


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.booleans(), st.integers(0, 10_000))
def test_descent_never_grows_the_error_and_ends_where_no_single_code_can_improve(
    rows, width, symmetric, seed
):
    scheme = parse_scheme("int3_channel" if symmetric else "int3_channel_asym")
    weight, gram = weights(rows, width, seed), gram_of(inputs(50, width, seed))
    grid = rtn_grid(weight, scheme)
    codes = nearest_codes(weight, grid, scheme)
    previous = loss(weight - values_of(codes, grid, scheme), gram)
    codes, grid = descend(weight, gram, codes, grid, scheme, 20)
    final = loss(weight - values_of(codes, grid, scheme), gram)
    assert final <= previous * (1 + 1e-5) + 1e-9
    low, high = (-4, 3) if symmetric else (0, 7)
    assert codes.min() >= low
    assert codes.max() <= high
    for column in range(width):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (moved[:, column] + step).clamp(low, high)
            assert loss(weight - values_of(moved, grid, scheme), gram) >= final * (1 - 1e-4) - 1e-9


@pytest.mark.parametrize("name", ["int4_g32", "int3_channel", "int4_g32_asym"])
def test_searched_scales_are_stored_exactly_and_lose_less(name):
    scheme, weight = parse_scheme(name), weights(16, 96)
    gram = gram_of(inputs(400, 96))
    grid = search_grid(weight, scheme, gram)
    assert torch.equal(grid.scales, grid.scales.half().float())

    def by_group(candidate):
        error = weight - values_of(nearest_codes(weight, candidate, scheme), candidate, scheme)
        size = scheme.group_size or 96
        parts = [slice(start, start + size) for start in range(0, 96, size)]
        losses = [((error[:, p] @ gram[p, p]) * error[:, p]).sum(1) for p in parts]
        return torch.stack(losses, 1)

    assert (by_group(grid) <= by_group(rtn_grid(weight, scheme)) * (1 + 1e-4)).all()
    assert by_group(grid).sum() < 0.97 * by_group(rtn_grid(weight, scheme)).sum()


def test_codes_of_inputs_that_were_never_active_are_rounded_to_nearest():
    x = inputs(500, 64)
    x[:, 10:20] = 0
    scheme, weight, gram = parse_scheme("int4_g32"), weights(8, 64), gram_of(x)
    propagation, grid = Propagation(gram), rtn_grid(weight, scheme)
    assert propagation.num_dead == 10
    codes = propagation.codes(weight, grid, scheme)
    assert torch.equal(codes[:, 10:20], nearest_codes(weight, grid, scheme)[:, 10:20])


def test_fewer_tokens_than_inputs_still_give_codes():
    """The moments are singular; they are shrunk, damped, and do no harm on other tokens."""
    x = inputs(1000, 128)
    scheme, weight = parse_scheme("int4_g32"), weights(32, 128)
    few = gram_of(x[:20])
    rounded = round_matrix(weight, scheme, METHODS[-1], few, Propagation(few))
    everything = x.T @ x / len(x)
    plain = weight - decoded(quantize_rtn(weight, scheme), scheme, 128)
    found = weight - decoded(rounded.tensor, scheme, 128)
    assert loss(found, everything) < 1.1 * loss(plain, everything)


def test_moments_that_no_damping_makes_invertible_are_said_to_be():
    broken = -torch.eye(8) * torch.arange(1, 9)
    assert Propagation(broken).damping is None


@pytest.mark.parametrize("given_weights", [True, False])
def test_drift_gives_weights_that_make_up_for_it(given_weights):
    """Inputs that moved by a linear map are undone: the solved shift is that map's inverse, least squares."""
    now = inputs(4000, 48)
    before = now @ (torch.eye(48) + 0.05 * torch.randn(48, 48, generator=torch.Generator().manual_seed(3)))
    weight = weights(16, 48)
    drift = Drift(48, weight if given_weights else None)
    for part in (slice(0, 1500), slice(1500, 4000)):
        drift.observe(now[part], before[part])
    gram = now.T @ now / len(now)
    shift = torch.linalg.solve(gram.double(), drift.pull(weight).double().T).T
    wanted = torch.linalg.lstsq(now.double(), (before @ weight.T).double()).solution.T
    assert torch.allclose(weight + shift, wanted, atol=1e-2)


def test_propagation_solves_against_its_moments():
    gram = gram_of(inputs(800, 40))
    right = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    assert torch.allclose(Propagation(gram).solve(right) @ damped, right, atol=1e-3)
