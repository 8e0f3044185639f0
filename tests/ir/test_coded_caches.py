"""Caches of 8-bit codes: what is written has computed scales, and attention reads code times scale."""

from __future__ import annotations

import pytest
import torch

llmc = torch.ops.llmc
PAGES, TOKENS, HEADS, K, V = 5, 4, 2, 8, 6
TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def empty_caches(dtype):
    shapes = (PAGES, TOKENS, HEADS)
    values = torch.zeros(*shapes, K, dtype=dtype), torch.zeros(*shapes, V, dtype=dtype)
    return (*values, torch.full(shapes, -7.0), torch.full(shapes, -7.0))


def write(k, v, caches, slots):
    llmc.kv_write(k, v, caches[0], caches[1], slots, caches[2], caches[3])


@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_each_token_and_head_has_its_own_scale(dtype, spread):
    k, v = randn(3, HEADS, K) * spread, randn(3, HEADS, V, seed=1) * spread
    k[1, 0] *= 100
    caches = empty_caches(dtype)
    write(k, v, caches, torch.tensor([6, -1, 19]))
    for values, cache, scales in ((k, caches[0], caches[2]), (v, caches[1], caches[3])):
        for token, (page, offset) in ((0, (1, 2)), (2, (4, 3))):
            for head in range(HEADS):
                top = values[token, head].abs().max()
                scale = scales[page, offset, head]
                assert scale == pytest.approx(float(top) / TOPS[dtype], rel=1e-6)
                back = cache[page, offset, head].float() * scale
                step = scale if dtype == torch.int8 else top / 14
                assert (back - values[token, head]).abs().max() <= 0.51 * step
                assert cache[page, offset, head].float().abs().max() == TOPS[dtype]
        written = torch.zeros(PAGES, TOKENS, dtype=torch.bool)
        written[1, 2] = written[4, 3] = True
        assert (scales[~written] == -7).all()
        assert not cache.float()[~written].any()


@pytest.mark.parametrize("dtype", TOPS)
def test_zeros_and_values_that_are_not_finite(dtype):
    k, v = torch.zeros(2, HEADS, K), randn(2, HEADS, V)
    v[0, 1, 3] = torch.inf
    caches = empty_caches(dtype)
    write(k, v, caches, torch.tensor([0, 1]))
    assert not caches[2][0, :2].any()
    assert caches[3][0, 0, 1].isnan()
    assert caches[3][0, 0, 0].isfinite()
    assert caches[3][0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", TOPS)
def test_attention_reads_codes_times_scales(dtype):
    k, v, q = randn(11, HEADS, K), randn(11, HEADS, V, seed=1), randn(11, 4, K, seed=2)
    caches = empty_caches(dtype)
    slots = torch.tensor([*range(8, 16), *range(4, 7)])
    write(k, v, caches, slots)
    exact = [cache.float() * scales[..., None] for cache, scales in zip(caches[:2], caches[2:], strict=True)]
    where = torch.empty(0), torch.tensor([[2, 3, 1]]), torch.tensor([0, 11]), torch.arange(11)
    settings = None, K**-0.5, 0, 0.0, 0
    found = llmc.paged_attention(q, *caches[:2], *where, *settings, *caches[2:])
    assert torch.equal(found, llmc.paged_attention(q, *exact, *where, *settings))
    plain = [torch.zeros(PAGES, TOKENS, HEADS, width) for width in (K, V)]
    llmc.kv_write(k, v, *plain, slots)
    near = llmc.paged_attention(q, *plain, *where, *settings)
    assert 0 < (found - near).abs().max() < (0.03 if dtype == torch.int8 else 0.2)


def test_rotation_and_write_together_are_the_two_apart():
    k, v, q = randn(5, HEADS, K), randn(5, HEADS, V, seed=1), randn(5, 4, K, seed=2)
    angles = torch.arange(5), torch.tensor([1.0, 0.1, 0.01, 0.001]), 1.0, "half", False
    slots, apart, together = torch.arange(5), empty_caches(torch.int8), empty_caches(torch.int8)
    write(llmc.rope(k, *angles), v, apart, slots)
    llmc.rope_kv_write(q, k, v, *angles, *together[:2], slots, *together[2:])
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)
